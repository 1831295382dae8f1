"""Spread the experts of a built model over the `ep` axis."""

import torch
from torch import nn

from moe_ray.config import ModelConfig
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.transformer import Transformer, init_weights, materialize
from moe_ray.parallel.dispatcher import AllToAllDispatcher
from moe_ray.parallel.mesh import Mesh
from moe_ray.telemetry.clock import PhaseClock


def build_sharded_model(
    config: ModelConfig, seed: int, mesh: Mesh, clock: PhaseClock, buffer_factor: float | None = None
) -> Transformer:
    """A model that holds this rank's share of the experts, with the weights that one process would have.

    No rank ever holds more than its share: the model is cut before memory is allocated.

    Args:
        buffer_factor: as in `shard_experts`.
    """
    with torch.device("meta"):
        model = Transformer(config)
    shard_experts(model, mesh, clock, buffer_factor)
    return init_weights(materialize(model, mesh.device), seed)


def shard_experts(model: Transformer, mesh: Mesh, clock: PhaseClock, buffer_factor: float | None = None) -> None:
    """Keep this rank's slice of each expert tensor and dispatch by all-to-all. In place; `ep` = 1 changes nothing.

    `config` has made sure that `ep` divides the experts.

    Args:
        buffer_factor: rows whose hidden activations a rank keeps, over the balanced share; None: all.
    """
    if mesh.ep_group is None:
        return
    for moe in model.moe_modules():
        experts = moe.experts
        share = experts.num_local_experts // mesh.ep
        experts.first_expert = mesh.ep_rank * share
        for name, parameter in experts.named_parameters():
            mine = parameter.detach()[experts.first_expert : experts.first_expert + share].clone()
            setattr(experts, name, nn.Parameter(mine))
        moe.dispatcher = AllToAllDispatcher(mesh.ep_group, clock, buffer_factor)


def expert_parameter_names(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that are stacked over experts on dim 0, and so are sharded over `ep`."""
    return frozenset(
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, GroupedExperts)
        for name, _ in module.named_parameters()
    )
