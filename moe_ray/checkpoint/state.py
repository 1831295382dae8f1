"""Training state as flat named tensors, split into what every rank holds and what is cut over the experts."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_ray.models.transformer import Transformer
from moe_ray.parallel.shard import expert_parameter_names


@dataclass(frozen=True)
class SplitTensors:
    """Named tensors of one rank.

    Attributes:
        dense: equal on all ranks.
        experts: this rank's slice, on dim 0, of tensors stacked over all experts.
    """

    dense: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)


def model_tensors(model: Transformer) -> SplitTensors:
    """Parameters and buffers; they share memory with the model."""
    expert_names = expert_parameter_names(model)
    split = SplitTensors()
    for name, tensor in model.state_dict().items():
        (split.experts if name in expert_names else split.dense)[name] = tensor
    return split


def optimizer_tensors(model: Transformer, optimizer: torch.optim.Optimizer) -> SplitTensors:
    """Optimizer state, named PARAMETER.KEY. Scalars such as the step count are equal on all ranks."""
    expert_names = expert_parameter_names(model)
    split = SplitTensors()
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            is_expert = name in expert_names and value.ndim > 0
            (split.experts if is_expert else split.dense)[f"{name}.{key}"] = value
    return split


def first_local_expert(model: Transformer) -> tuple[int, int]:
    """Global index of this rank's first expert, and how many it holds."""
    experts = next(model.moe_modules()).experts
    return experts.first_expert, experts.num_local_experts
