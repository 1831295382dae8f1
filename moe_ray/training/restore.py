"""Bring the training state of any world to where the run's newest good checkpoint was taken."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_ray.checkpoint.catalog import (
    all_damaged,
    cache_folder,
    checkpoint_name,
    list_steps,
    open_files,
    read_step,
    remove,
    tidy,
)
from moe_ray.checkpoint.load import files_for, load_shards
from moe_ray.checkpoint.manifest import FileKind, Manifest
from moe_ray.checkpoint.retention import steps_to_keep
from moe_ray.data.reader import TokenData
from moe_ray.errors import ANOTHER_RANK, CheckpointError, MoeRayError, TrainingError
from moe_ray.parallel.layout import Shard, model_shards, optimizer_shards
from moe_ray.parallel.mesh import Mesh
from moe_ray.storage import Storage
from moe_ray.telemetry.run_log import drop_metrics_after, read_metrics
from moe_ray.training.resume import check_data
from moe_ray.training.start import start_weights
from moe_ray.training.step import Trainer

_logger = logging.getLogger(__name__)
# They go along into the checkpoints to come.
_SMALL = frozenset({"tokenizer", "sidecar"})
_Shards = dict[FileKind, dict[str, Shard]]


@dataclass(frozen=True)
class Restored:
    """Where a run goes on.

    Attributes:
        step: finished steps.
        redone_steps: steps that were done, as far as they were logged, and are done again.
    """

    step: int
    redone_steps: int


def restore(trainer: Trainer, run: Storage, data: TokenData, claim: Callable[[], None] = lambda: None) -> Restored:
    """Load the newest good checkpoint, or what the run starts from; all ranks call it.

    Each rank reads and verifies the files that it needs; a checkpoint counts as good if all ranks find it so.

    Args:
        claim: called on rank 0 before anything of the run is changed; raises if the run is another's.

    Raises:
        CheckpointError: all checkpoints of the run are damaged, or they are of another architecture or data.
        StorageError: the storage cannot be read now.
    """
    mesh = trainer.mesh
    shards: _Shards = {
        "model": model_shards(trainer.model, mesh),
        "optimizer": optimizer_shards(trainer.model, trainer.optimizer, mesh),
    }
    steps = _agree_on_steps(run, mesh)
    step = next((step for step in reversed(steps) if _load(run, step, shards, mesh, data)), 0)
    if steps and not step:
        raise all_damaged(run, len(steps))
    if not step:
        start_weights(trainer)
    redone = 0

    def forget() -> None:
        nonlocal redone
        if mesh.rank == 0:
            claim()
            redone = max([step, *(metrics["step"] for metrics in read_metrics(run))]) - step
            metrics = tidy(run, step)
            # A start that was killed between the two made a checkpoint without room for it.
            for old in metrics.keys() - steps_to_keep(metrics, trainer.config.checkpoint):
                remove(run, old)
            drop_metrics_after(run, step)

    together(mesh, forget)
    return Restored(step, int(mesh.sum_over_world(torch.tensor(redone, device=mesh.device))))


def together(mesh: Mesh, action: Callable[[], None]) -> None:
    """Run an action on every rank; if it fails on one, all raise.

    Raises:
        MoeRayError: its own on a rank that failed, a TrainingError on the others.
    """
    problem: MoeRayError | None = None
    try:
        action()
    except MoeRayError as error:
        problem = error
    failed = mesh.sum_over_world(torch.tensor(int(problem is not None), device=mesh.device))
    if problem is not None:
        raise problem
    if int(failed):
        raise TrainingError(ANOTHER_RANK, "see the error of that rank.")


def _agree_on_steps(run: Storage, mesh: Mesh) -> list[int]:
    """What rank 0 lists: another rank may see a shared folder a moment later."""
    steps: list[int] = []

    def look() -> None:
        if mesh.rank == 0:
            steps.extend(list_steps(run))

    together(mesh, look)
    count = mesh.sum_over_world(torch.tensor(len(steps), device=mesh.device))
    seen = torch.tensor(steps or [0] * int(count), dtype=torch.int64, device=mesh.device)
    return mesh.sum_over_world(seen).tolist()


def _load(run: Storage, step: int, shards: _Shards, mesh: Mesh, data: TokenData) -> bool:
    """Whether the checkpoint is good; if so it is loaded."""
    opened: tuple[Path, Manifest] | None = None

    def look() -> None:
        nonlocal opened
        try:
            opened = _open(run, step, shards)
        except CheckpointError as error:
            _logger.warning("skipping a checkpoint: %s", error.problem)

    together(mesh, look)
    bad = mesh.sum_over_world(torch.tensor(int(opened is None), device=mesh.device))
    if opened is None or int(bad):
        return False
    folder, manifest = opened
    check_data(manifest, data.index)

    def load() -> None:
        for kind, of_kind in shards.items():
            load_shards(folder, manifest, kind, of_kind)

    together(mesh, load)
    _drop_copies(run, step)
    _logger.info("rank %d resumed from step %d of %s", mesh.rank, step, run.uri)
    return True


def _open(run: Storage, step: int, shards: _Shards) -> tuple[Path, Manifest]:
    manifest = read_step(run, step)
    files = [entry for entry in manifest.files if entry.kind in _SMALL]
    files += [entry for kind, of_kind in shards.items() for entry in files_for(manifest, kind, of_kind)]
    return open_files(run.child(checkpoint_name(step)), files), manifest


def _drop_copies(run: Storage, step: int) -> None:
    """What was copied to this node to be read once."""
    if run.local is None:
        shutil.rmtree(cache_folder(run.child(checkpoint_name(step))), ignore_errors=True)
