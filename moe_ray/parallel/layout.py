"""Where each tensor of the training state lies: which part of the whole this rank holds, and who else holds it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_ray.models.experts import GroupedExperts
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.mesh import Mesh


@dataclass(frozen=True)
class Shard:
    """This rank's part of one named tensor.

    Attributes:
        local: the part; it shares memory with the model or optimizer. May be empty.
        offset: where it begins in the whole tensor, by dim.
        shape: of the whole tensor.
        copy: which of the ranks that hold this same part this one is, from 0.
        copies: how many hold it.
    """

    local: Tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    copy: int
    copies: int


def model_shards(model: Transformer, mesh: Mesh) -> dict[str, Shard]:
    """Parameters and buffers by their names in the state dict."""
    experts = _expert_parameters(model)
    return {
        name: _expert_shard(tensor, experts[name], mesh) if name in experts else _copied(tensor, mesh)
        for name, tensor in model.state_dict().items()
    }


def optimizer_shards(model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh) -> dict[str, Shard]:
    """Optimizer state, named PARAMETER.KEY; scalars such as the step count are equal on all ranks."""
    experts = _expert_parameters(model)
    shards = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            is_expert = name in experts and value.ndim > 0
            shard = _expert_shard(value, experts[name], mesh) if is_expert else _copied(value, mesh)
            shards[f"{name}.{key}"] = shard
    return shards


def init_optimizer_state(optimizer: torch.optim.AdamW) -> None:
    """Give every parameter the state of a first step not yet taken, so that a checkpoint can be read into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _copied(tensor: Tensor, mesh: Mesh) -> Shard:
    return Shard(tensor, (0,) * tensor.ndim, tuple(tensor.shape), mesh.rank, mesh.world_size)


def _expert_shard(tensor: Tensor, first_expert: int, mesh: Mesh) -> Shard:
    offset = (first_expert, *(0,) * (tensor.ndim - 1))
    return Shard(tensor, offset, (tensor.shape[0] * mesh.ep, *tensor.shape[1:]), mesh.dp_rank, mesh.dp)


def _expert_parameters(model: nn.Module) -> dict[str, int]:
    """Global index of the first local expert, by the name of each parameter that is stacked over experts."""
    return dict(_find_expert_parameters(model))


def _find_expert_parameters(model: nn.Module) -> Iterator[tuple[str, int]]:
    for module_name, module in model.named_modules():
        if isinstance(module, GroupedExperts):
            for name, _ in module.named_parameters():
                yield f"{module_name}.{name}", module.first_expert
