"""The checkpoints of a run: names, order, the newest good one, retention."""

import logging
import os
import re
import shutil
from pathlib import Path

from moe_ray.checkpoint.manifest import MANIFEST, Manifest, read_manifest, verify
from moe_ray.errors import CheckpointError

_logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})")
_STAGING_PREFIX = ".staging-"


def checkpoints_dir(run_dir: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is or will be."""
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def staging_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it becomes visible."""
    return checkpoints_dir(run_dir) / f"{_STAGING_PREFIX}{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = checkpoints_dir(run_dir).glob(f"step-*/{MANIFEST}")
    named = [(match, path.parent) for path in found if (match := _NAME.fullmatch(path.parent.name))]
    return [path for _, path in sorted((int(match[1]), path) for match, path in named)]


def newest_good(run_dir: Path, kinds: frozenset[str] | None = None) -> tuple[Path, Manifest] | None:
    """The newest checkpoint that verifies; damaged ones are logged with the file at fault and passed over.

    Raises:
        CheckpointError: there are checkpoints but all are damaged.
    """
    checkpoints = list_checkpoints(run_dir)
    for checkpoint in reversed(checkpoints):
        try:
            manifest = read_manifest(checkpoint)
            if checkpoint != checkpoint_path(run_dir, manifest.step):
                raise CheckpointError(f"{str(checkpoint)!r} holds step {manifest.step}.", "rename it.")
            verify(checkpoint, manifest, kinds)
        except CheckpointError as error:
            _logger.warning("skipping a checkpoint: %s", error.problem)
        else:
            return checkpoint, manifest
    if checkpoints:
        raise CheckpointError(
            f"all {len(checkpoints)} checkpoints in {str(checkpoints_dir(run_dir))!r} are damaged.",
            "restore one from a backup, or choose another train.name to start again.",
        )
    return None


def resolve_checkpoint(
    run_or_checkpoint: str | Path, kinds: frozenset[str] | None = None
) -> tuple[Path, Manifest]:
    """A given checkpoint, or the newest good one of a given run; verified.

    Raises:
        CheckpointError: there is none, or the given one is damaged.
    """
    path = Path(os.path.expanduser(run_or_checkpoint)).resolve()
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        verify(path, manifest, kinds)
        return path, manifest
    found = newest_good(path, kinds)
    if found is None:
        state = "holds no checkpoint" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"checkpoint={str(run_or_checkpoint)!r} {state}.",
            "give a run folder that has checkpoints/, or one of its checkpoints/step-* folders.",
        )
    return found


def discard_unfinished(run_dir: Path) -> None:
    """Remove what a killed writer left behind. Only the one writer of the run may call this."""
    for leftover in checkpoints_dir(run_dir).glob(f"{_STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def set_aside_later(run_dir: Path, step: int) -> None:
    """Rename checkpoints that were passed over, so that they neither count as newest nor push out good ones."""
    for checkpoint in list_checkpoints(run_dir):
        if checkpoint.name > checkpoint_path(run_dir, step).name:
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)


def keep_newest(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; each disappears by one rename before its files go."""
    for checkpoint in list_checkpoints(run_dir)[:-keep_last]:
        doomed = checkpoint.with_name(f"{_STAGING_PREFIX}old-{checkpoint.name}")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
