"""Where each tensor of the training state lies: which part of the whole this rank holds, and who else holds it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Placement

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
    return {name: _shard(tensor, experts.get(name), mesh) for name, tensor in model.state_dict().items()}


def optimizer_shards(model: Transformer, optimizer: torch.optim.Optimizer, mesh: Mesh) -> dict[str, Shard]:
    """Optimizer state, named PARAMETER.KEY; scalars such as the step count are equal on all ranks."""
    experts = _expert_parameters(model)
    shards = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            first_expert = experts.get(name) if value.ndim else None
            shards[f"{name}.{key}"] = _shard(value, first_expert, mesh)
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


def _shard(tensor: Tensor, first_expert: int | None, mesh: Mesh) -> Shard:
    """Place a tensor that is whole, stacked over the experts from `first_expert` on, or sharded by FSDP2."""
    offset, shape = [0] * tensor.ndim, list(tensor.shape)
    copy, copies = mesh.rank, mesh.world_size
    if first_expert is not None:
        offset[0], shape[0] = first_expert, shape[0] * mesh.ep
        copy, copies = mesh.dp_rank, mesh.dp
    if isinstance(tensor, DTensor):
        dim, begin = _begin_of_part(tensor)
        offset[dim] += begin
        tensor, copy, copies = tensor.to_local().detach(), 0, 1
    return Shard(tensor, tuple(offset), tuple(shape), copy, copies)


@torch.no_grad()
def copy_weights(source: Transformer, target: Transformer, mesh: Mesh) -> None:
    """Copy all parameters and buffers of a model that FSDP2 does not shard into one that it may shard, in place.

    Args:
        source: with the same share of the experts.
    """
    whole = model_shards(source, mesh)
    for name, shard in model_shards(target, mesh).items():
        begins = (mine - theirs for mine, theirs in zip(shard.offset, whole[name].offset, strict=True))
        box = tuple(slice(begin, begin + n) for begin, n in zip(begins, shard.local.shape, strict=True))
        shard.local.copy_(whole[name].local[box])


def _begin_of_part(tensor: DTensor) -> tuple[int, int]:
    """The dim that is cut, and where this rank's part begins: all but the last parts are of equal size."""
    (placement,) = tensor.placements
    assert isinstance(placement, Placement)
    size, parts = tensor.shape[placement.dim], tensor.device_mesh.size()
    return placement.dim, min(tensor.device_mesh.get_local_rank() * math.ceil(size / parts), size)


def _expert_parameters(model: nn.Module) -> dict[str, int]:
    """Global index of the first local expert, by the name of each parameter that is stacked over experts."""
    return dict(_find_expert_parameters(model))


def _find_expert_parameters(model: nn.Module) -> Iterator[tuple[str, int]]:
    for module_name, module in model.named_modules():
        if isinstance(module, GroupedExperts):
            for name, _ in module.named_parameters():
                yield f"{module_name}.{name}", module.first_expert
