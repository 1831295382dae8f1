"""Gradients over the mesh: summed over the ranks that replicate a parameter, with a norm that counts each once.

The loss is a sum over local tokens divided by the global token count, so gradients are summed, not averaged.
The all-to-all's backward has already summed expert gradients over `ep`; only `dp` is left to do. What FSDP2
shards it has also reduced (`parallel/fsdp.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_ray.parallel.mesh import Mesh
from moe_ray.parallel.shard import expert_parameter_names

_BUCKET_ELEMENTS = 16 * 1024 * 1024


@dataclass(frozen=True)
class _Gradients:
    """This rank's gradients, by the ranks that hold other parts of the same parameters.

    Attributes:
        whole: dense ones, which every rank holds whole.
        over_ep: of experts that are whole on the rank.
        over_world: parts of parameters that FSDP2 shards; no two ranks hold the same.
    """

    whole: list[Tensor]
    over_ep: list[Tensor]
    over_world: list[Tensor]


@torch.no_grad()
def reduce_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum dense gradients over the world and expert gradients over `dp`, in place.

    A parameter that took no part on this rank contributes zeros.
    """
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = _local_gradients(model)
    if mesh.world_size > 1:
        _all_reduce(gradients.whole, None)
    if mesh.dp_group is not None:
        _all_reduce(gradients.over_ep, mesh.dp_group)


@torch.no_grad()
def clip_gradients(model: nn.Module, mesh: Mesh, max_norm: float) -> Tensor:
    """Scale the reduced gradients to a global L2 norm of at most `max_norm`.

    Returns:
        The norm before clipping, float32 scalar, equal on all ranks.
    """
    gradients = _local_gradients(model)
    square = _sum_of_squares(gradients.over_ep, mesh.device)
    if mesh.ep_group is not None:
        dist.all_reduce(square, group=mesh.ep_group)
    if gradients.over_world:
        square += mesh.sum_over_world(_sum_of_squares(gradients.over_world, mesh.device))
    norm = (_sum_of_squares(gradients.whole, mesh.device) + square).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*gradients.whole, *gradients.over_ep, *gradients.over_world], scale)
    return norm


def _local_gradients(model: nn.Module) -> _Gradients:
    expert_names = expert_parameter_names(model)
    gradients = _Gradients([], [], [])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        if isinstance(parameter.grad, DTensor):
            gradients.over_world.append(parameter.grad.to_local())
        else:
            (gradients.over_ep if name in expert_names else gradients.whole).append(parameter.grad)
    return gradients


def _sum_of_squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(gradients)).square().sum()


def _all_reduce(gradients: list[Tensor], group: dist.ProcessGroup | None) -> None:
    """Few large messages instead of one a tensor."""
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    bucket, elements = [], 0
    for tensor in tensors:
        if bucket and elements + tensor.numel() > _BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket
