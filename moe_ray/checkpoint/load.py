"""Read a checkpoint into the training state of any world: each rank reads only the boxes that it holds."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe_ray.checkpoint.manifest import FileEntry, FileKind, Manifest, Part
from moe_ray.errors import CheckpointError
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.layout import Shard, model_shards
from moe_ray.parallel.mesh import Mesh

_OTHER_SETTINGS = "use the model settings that the run was started with."


def load_model(
    folder: Path, manifest: Manifest, model: Transformer, is_wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Copy the weights and buffers of verified files into a model that has all experts, or a share of them.

    Args:
        is_wanted: whether to copy a tensor, given its name.

    Raises:
        CheckpointError: the checkpoint is of another architecture.
    """
    experts = next(model.moe_modules()).experts
    ep = model.config.num_experts // experts.num_local_experts
    alone = Mesh(rank=0, world_size=ep, ep=ep, device=torch.device("cpu"))
    shards = {name: shard for name, shard in model_shards(model, alone).items() if is_wanted(name)}
    load_shards(folder, manifest, "model", shards)


@torch.no_grad()
def load_shards(folder: Path, manifest: Manifest, kind: FileKind, shards: Mapping[str, Shard]) -> None:
    """Copy tensors of verified files of one kind into the shards, in place.

    Raises:
        CheckpointError: a tensor is missing or of another shape.
    """
    sources = _index(manifest, kind)
    files: dict[str, Any] = {}
    for name, shard in shards.items():
        _check_shape(name, shard, sources[name], folder)
        copied = 0
        for entry, part, box in _overlaps(shard, sources[name]):
            if entry.name not in files:
                files[entry.name] = safe_open(folder / entry.name, framework="pt")
            stored = files[entry.name].get_slice(name)
            source = stored[_slices(box, part.offset)] if box else files[entry.name].get_tensor(name)
            target = shard.local[_slices(box, shard.offset)] if box else shard.local
            target.copy_(source)
            copied += source.numel()
        if copied != shard.local.numel():
            raise CheckpointError(f"checkpoint {str(folder)!r} lacks parts of {name}.", _OTHER_SETTINGS)


def files_for(manifest: Manifest, kind: FileKind, shards: Mapping[str, Shard]) -> list[FileEntry]:
    """Files of one kind that hold something of these shards."""
    sources = _index(manifest, kind)
    needed = {entry.name for name, shard in shards.items() for entry, *_ in _overlaps(shard, sources[name])}
    return [entry for entry in manifest.files if entry.name in needed]


_Box = tuple[tuple[int, int], ...]


def _index(manifest: Manifest, kind: FileKind) -> dict[str, list[tuple[FileEntry, Part]]]:
    sources: dict[str, list[tuple[FileEntry, Part]]] = defaultdict(list)
    for entry in manifest.files:
        if entry.kind == kind:
            for name, part in entry.tensors.items():
                sources[name].append((entry, part))
    return sources


def _check_shape(name: str, shard: Shard, sources: Iterable[tuple[FileEntry, Part]], folder: Path) -> None:
    for _, part in sources:
        if part.whole != shard.shape:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} has {name} of shape {part.whole} where the model has {shard.shape}.",
                _OTHER_SETTINGS,
            )


def _overlaps(shard: Shard, sources: Iterable[tuple[FileEntry, Part]]) -> Iterator[tuple[FileEntry, Part, _Box]]:
    """Each stored part that shares elements with the shard, and the box that they share, in whole coordinates."""
    for entry, part in sources:
        if len(part.offset) != len(shard.offset):
            continue
        box = tuple(
            (max(mine, theirs), min(mine + my_size, theirs + their_size))
            for mine, my_size, theirs, their_size in zip(
                shard.offset, shard.local.shape, part.offset, part.size, strict=True
            )
        )
        if all(low < high for low, high in box):
            yield entry, part, box


def _slices(box: _Box, origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(low - start, high - start) for (low, high), start in zip(box, origin, strict=True))
