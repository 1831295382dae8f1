"""Gradients over the mesh: summed over the ranks that replicate a parameter, with a norm that counts each once.

The loss is a sum over local tokens divided by the global token count, so gradients are summed, not averaged.
The all-to-all's backward has already summed expert gradients over `ep`; only `dp` is left to do.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_ray.parallel.mesh import Mesh
from moe_ray.parallel.shard import expert_parameter_names

_BUCKET_ELEMENTS = 16 * 1024 * 1024


def reduce_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum dense gradients over the world and expert gradients over `dp`, in place.

    A parameter that took no part on this rank contributes zeros.
    """
    dense, experts = _split_parameters(model)
    for parameter in dense + experts:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if mesh.world_size > 1:
        _all_reduce([_gradient(p) for p in dense], None)
    if mesh.dp_group is not None:
        _all_reduce([_gradient(p) for p in experts], mesh.dp_group)


def clip_gradients(model: nn.Module, mesh: Mesh, max_norm: float) -> Tensor:
    """Scale the reduced gradients to a global L2 norm of at most `max_norm`.

    Returns:
        The norm before clipping, float32 scalar, equal on all ranks.
    """
    dense, experts = _split_parameters(model)
    expert_square = _sum_of_squares(experts, mesh.device)
    if mesh.ep_group is not None:
        dist.all_reduce(expert_square, group=mesh.ep_group)
    norm = (_sum_of_squares(dense, mesh.device) + expert_square).sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([_gradient(p) for p in dense + experts], scale)
    return norm


def _split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    expert_names = expert_parameter_names(model)
    named = list(model.named_parameters())
    return [p for n, p in named if n not in expert_names], [p for n, p in named if n in expert_names]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _sum_of_squares(parameters: Sequence[nn.Parameter], device: torch.device) -> Tensor:
    if not parameters:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm([_gradient(p) for p in parameters])).square().sum()


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
