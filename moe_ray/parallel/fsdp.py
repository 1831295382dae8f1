"""FSDP2 (Zhao et al. 2023): a rank keeps 1 / n of a parameter, its gradient and its optimizer state.

The weights of a block are gathered in float32 before its forward and again before its backward pass, and freed
after each. Dense parameters are spread over the world, experts over the `dp` ranks that would hold copies of them.
Gradients are summed in float32 after every micro-batch, so that none is ever held whole for longer than a block.

Shapes: B sequences, S tokens of each, T tokens (B*S), D model dim, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_ray.config import ParallelConfig
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.router import Routing
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.mesh import Mesh


@dataclass(frozen=True)
class ShardingAxes:
    """The ranks that parameters are spread over; None where each rank keeps them whole."""

    dense: DeviceMesh | None
    experts: DeviceMesh | None


def sharding_axes(parallel: ParallelConfig, mesh: Mesh) -> ShardingAxes:
    """What the settings come to in this world, where there may be one rank or one copy of the experts only."""
    device = mesh.device.type
    dense = experts = None
    if parallel.shard_dense and mesh.world_size > 1:
        assert dist.group.WORLD is not None
        dense = DeviceMesh.from_group(dist.group.WORLD, device)
    if parallel.shard_experts and mesh.dp_group is not None:
        experts = DeviceMesh.from_group(mesh.dp_group, device)
    return ShardingAxes(dense, experts)


def shard_block(block: nn.Module, axes: ShardingAxes) -> None:
    """Shard the parameters of an initialised block, in place; what it held whole is freed."""
    if axes.experts is not None:
        for module in block.modules():
            if isinstance(module, GroupedExperts):
                _shard_experts(module, axes.experts)
    if axes.dense is not None:
        _fully_shard(block, mesh=axes.dense, reshard_after_forward=True, ignored_params=_plain_experts(block))


def shard_root(model: Transformer, axes: ShardingAxes) -> None:
    """Shard what belongs to no block: embedding, last norm and head. All blocks have been sharded before."""
    if axes.dense is not None:
        # They are used last in the forward pass and first in the backward: `predict` frees them where none comes.
        _fully_shard(model, mesh=axes.dense, reshard_after_forward=False, ignored_params=_plain_experts(model))


def predict(model: Transformer, tokens_BS: Tensor) -> tuple[Tensor, tuple[Routing, ...]]:
    """Next-token logits_TV of a micro-batch and the routings of its MoE layers, for any layout of the parameters.

    Args:
        tokens_BS: token ids, int64; B may be 0. Every rank calls equally often.
    """
    output = model(tokens_BS)
    logits_TV = model.logits(output.hidden_BSD.flatten(0, 1))
    if _is_sharded(model) and not torch.is_grad_enabled():
        model.reshard()  # ty: ignore
    return logits_TV, output.routings


def expert_shard_dim(shape: torch.Size, parts: int) -> int:
    """The dim of a tensor stacked over experts that is cut into `parts`: the first that they divide, else 0.

    FSDP2 cuts only dim 0 into uneven parts, and there are often fewer local experts than parts.
    """
    return next((dim for dim, size in enumerate(shape) if size % parts == 0), 0)


def _shard_experts(experts: GroupedExperts, axis: DeviceMesh) -> None:
    from torch.distributed.tensor import Shard

    _fully_shard(
        experts,
        mesh=axis,
        reshard_after_forward=True,
        shard_placement_fn=lambda parameter: Shard(expert_shard_dim(parameter.shape, axis.size())),
    )


def _plain_experts(module: nn.Module) -> set[nn.Parameter]:
    """Expert parameters that each rank of `dp` keeps whole."""
    return {
        parameter
        for experts in module.modules()
        if isinstance(experts, GroupedExperts) and not _is_sharded(experts)
        for parameter in experts.parameters()
    }


def _is_sharded(module: nn.Module) -> bool:
    return hasattr(module, "reshard")


def _fully_shard(part: nn.Module, **how: Any) -> None:
    """Shard, and sum gradients: the loss is a sum over local tokens divided by the global token count."""
    # Half a second, which a restart without FSDP2 need not wait for.
    from torch.distributed.fsdp import fully_shard

    module: Any = fully_shard(part, **how)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
    # Which parameters take part may depend on the micro-batch, but all ranks must exchange the same ones.
    module.set_reduce_scatter_unused_params(True, recurse=False)
