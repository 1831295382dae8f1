"""Write a checkpoint from all ranks: aside, checksummed, made visible by one rename.

Every expert tensor is written by a rank that holds it, everything else by rank 0, so no rank gathers
another's share, and any other world can read its own.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moe_ray.checkpoint.catalog import checkpoint_path, keep_newest, staging_path
from moe_ray.checkpoint.manifest import MANIFEST, FileEntry, Manifest, describe_file
from moe_ray.checkpoint.state import first_local_expert, model_tensors, optimizer_tensors
from moe_ray.config import Config
from moe_ray.durable import sync
from moe_ray.errors import StorageError
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.mesh import Mesh

TOKENIZER = "tokenizer.json"
_ENTRIES = TypeAdapter(list[FileEntry])


@dataclass(frozen=True)
class _SmallFiles:
    """What a checkpoint holds beside tensors."""

    tokenizer_file: Path
    sidecars: Mapping[str, bytes]

    def write(self, staging: Path) -> list[FileEntry]:
        shutil.copyfile(self.tokenizer_file, staging / TOKENIZER)
        for name, content in self.sidecars.items():
            (staging / name).write_bytes(content)
        entries = [describe_file(staging / TOKENIZER, "tokenizer")]
        entries += [describe_file(staging / name, "sidecar") for name in self.sidecars]
        for entry in entries:
            sync(staging / entry.name)
        return entries


def save_checkpoint(
    config: Config,
    mesh: Mesh,
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    tokenizer_file: Path,
    *,
    step: int,
    data_digest: str,
    sidecars: Mapping[str, bytes] | None = None,
) -> Path:
    """Save the training state after `step` optimizer steps; all ranks call it.

    Older checkpoints stay as they are until this one is visible; then all but `checkpoint.keep_last` go.

    Args:
        tokenizer_file: copied into the checkpoint, which so holds all that serving needs.
        data_digest: identity of the training tokens, to be compared on resume.
        sidecars: small files by name that came with the weights that the run started from, for export.

    Returns:
        The checkpoint directory.

    Raises:
        StorageError: a rank could not write; on every rank, with nothing left behind.
    """
    staging = staging_path(config.train.run_dir, step)
    final = checkpoint_path(config.train.run_dir, step)
    small_files = _SmallFiles(tokenizer_file, sidecars or {})
    _all_ranks(mesh, staging, lambda: _prepare(staging, mesh))
    _all_ranks(mesh, staging, lambda: _write_share(staging, mesh, model, optimizer, small_files))
    _all_ranks(mesh, staging, lambda: _publish(staging, final, config, mesh, step, data_digest))
    return final


def _all_ranks(mesh: Mesh, staging: Path, action: Callable[[], None]) -> None:
    """Run a stage on all ranks; none goes on before all have succeeded."""
    problem: Exception | None = None
    try:
        action()
    except (OSError, SafetensorError) as error:
        problem = error
    failures = mesh.sum_over_world(torch.tensor(int(problem is not None), device=mesh.device))
    if int(failures) == 0:
        return
    if mesh.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
    reason = problem or f"{int(failures)} other ranks failed"
    raise StorageError(
        f"the checkpoint {str(staging.parent)!r} could not be written: {reason}.",
        "free space or mend the storage and run the same command again; earlier checkpoints are intact.",
    )


def _prepare(staging: Path, mesh: Mesh) -> None:
    if mesh.rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)


def _write_share(
    staging: Path, mesh: Mesh, model: Transformer, optimizer: torch.optim.Optimizer, small_files: _SmallFiles
) -> None:
    entries = []
    kinds: tuple[Literal["model", "optimizer"], ...] = ("model", "optimizer")
    for kind, split in zip(kinds, (model_tensors(model), optimizer_tensors(model, optimizer)), strict=True):
        if mesh.rank == 0:
            path = staging / f"{kind}-dense.safetensors"
            _write_tensors(split.dense, path)
            entries.append(describe_file(path, kind))
        if mesh.dp_rank == 0:
            first, count = first_local_expert(model)
            path = staging / f"{kind}-experts-{first:05d}.safetensors"
            _write_tensors(split.experts, path)
            entries.append(describe_file(path, kind, first, count))
    if mesh.rank == 0:
        entries += small_files.write(staging)
    _entries_path(staging, mesh.rank).write_bytes(_ENTRIES.dump_json(entries))


def _publish(staging: Path, final: Path, config: Config, mesh: Mesh, step: int, data_digest: str) -> None:
    if mesh.rank != 0:
        return
    files: list[FileEntry] = []
    for rank in range(mesh.world_size):
        path = _entries_path(staging, rank)
        files += _ENTRIES.validate_json(path.read_bytes())
        path.unlink()
    sequences = step * config.train.global_batch
    manifest = Manifest(
        step=step,
        tokens=sequences * config.data.sequence_length,
        data_position=sequences,
        data_digest=data_digest,
        rng_seed=config.train.seed,
        world_size=mesh.world_size,
        ep=mesh.ep,
        config=config.model_dump(mode="json"),
        files=tuple(files),
    )
    (staging / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
    sync(staging / MANIFEST)
    sync(staging)
    if final.exists():  # a damaged one that was passed over at the start
        shutil.rmtree(final)
    staging.rename(final)
    sync(final.parent)
    keep_newest(config.train.run_dir, config.checkpoint.keep_last)


def _entries_path(staging: Path, rank: int) -> Path:
    return staging / f"entries-{rank}.json"


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    sync(path)
