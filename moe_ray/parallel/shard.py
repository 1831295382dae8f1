"""Build the model of one rank: its share of the experts, and of each parameter where FSDP2 shards them."""

from collections.abc import Iterator

import torch
from torch import nn

from moe_ray.config import ModelConfig, ParallelConfig
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.transformer import Block, Transformer, init_weights, materialize
from moe_ray.parallel.dispatcher import AllToAllDispatcher
from moe_ray.parallel.fsdp import shard_block, shard_root, sharding_axes
from moe_ray.parallel.mesh import Mesh
from moe_ray.telemetry.clock import PhaseClock

_REPLICATED = ParallelConfig()


def build_sharded_model(
    config: ModelConfig, seed: int, mesh: Mesh, clock: PhaseClock, parallel: ParallelConfig = _REPLICATED
) -> Transformer:
    """A model that holds this rank's share of the parameters, with the weights that one process would have.

    No rank ever holds more than its share, the embeddings and one block of its experts: the model is cut before
    memory is allocated, and sharded part by part.

    Args:
        parallel: says with `shard_dense` and `shard_experts` what FSDP2 shards, and with `dispatch_buffer_factor`
            which activations of the experts are kept.
    """
    with torch.device("meta"):
        model = Transformer(config)
    shard_experts(model, mesh, clock, parallel.dispatch_buffer_factor)
    axes = sharding_axes(parallel, mesh)
    for name, part in _parts(model):
        materialize(part, mesh.device)
        init_weights(part, config, seed, name)
        if isinstance(part, Block):
            shard_block(part, axes)
    shard_root(model, axes)
    return model


def shard_experts(model: Transformer, mesh: Mesh, clock: PhaseClock, buffer_factor: float) -> None:
    """Keep this rank's slice of each expert tensor and dispatch by all-to-all. In place; `ep` = 1 changes nothing.

    `config` has made sure that `ep` divides the experts.

    Args:
        buffer_factor: rows whose hidden activations a rank keeps, over the balanced share.
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


def _parts(model: Transformer) -> Iterator[tuple[str, nn.Module]]:
    """The blocks and what lies beside them; together all of the model."""
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{index}", part) for index, part in child.named_children())
        else:
            yield name, child
