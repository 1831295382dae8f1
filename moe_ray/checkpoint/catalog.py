"""The checkpoints of a run: names, order, the newest good one, what a killed writer left."""

import logging
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from moe_ray.checkpoint.manifest import MANIFEST, FileEntry, Manifest, check_file, decode_manifest
from moe_ray.errors import CheckpointError
from moe_ray.storage import Storage, open_storage

_logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"
DAMAGED = f"damaged-{MANIFEST}"
_NAME = re.compile(r"step-(\d{8,})")
_FOR_INFERENCE = frozenset({"model", "tokenizer", "sidecar"})


def checkpoint_name(step: int) -> str:
    """Where the checkpoint of a step is or will be, in the storage of its run."""
    return f"{CHECKPOINTS}/step-{step:08d}"


def list_steps(run: Storage) -> list[int]:
    """Steps of the complete checkpoints of a run, oldest first."""
    return sorted(step for step, names in _folders(run).items() if MANIFEST in names)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run on a disk, oldest first."""
    return [run_dir / checkpoint_name(step) for step in list_steps(open_storage(run_dir))]


def read_manifest(checkpoint: Storage | Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged, or of a format that this version does not know.
        StorageError: it cannot be read now.
    """
    storage = open_storage(checkpoint) if isinstance(checkpoint, Path) else checkpoint
    try:
        content = storage.read(MANIFEST)
    except FileNotFoundError:
        raise CheckpointError(
            f"{storage.uri!r} is no checkpoint: it has no {MANIFEST}.",
            "give a run folder or one of its checkpoints/step-* folders.",
        ) from None
    return decode_manifest(content, f"{_shown(storage)}/{MANIFEST}")


def read_step(run: Storage, step: int) -> Manifest:
    """The manifest of a run's checkpoint.

    Raises:
        CheckpointError: as `read_manifest`, or the folder's name lies.
        StorageError: it cannot be read now.
    """
    manifest = read_manifest(run.child(checkpoint_name(step)))
    if manifest.step != step:
        raise CheckpointError(
            f"{checkpoint_name(step)}/{MANIFEST} is of step {manifest.step}.", "restore it from a backup."
        )
    return manifest


def newest_manifest(run: Storage) -> Manifest | None:
    """That of the newest checkpoint whose manifest is whole, without a look at its other files."""
    return next(filter(None, (_read_good(run, step) for step in reversed(list_steps(run)))), None)


def is_whole(run: Storage, manifest: Manifest) -> bool:
    """Whether all files of a run's checkpoint are there and undamaged; one that is not is named in the log."""
    try:
        open_files(run.child(checkpoint_name(manifest.step)), manifest.files)
    except CheckpointError as error:
        _logger.warning("skipping a checkpoint: %s", error.problem)
        return False
    return True


def open_files(checkpoint: Storage, files: Iterable[FileEntry]) -> Path:
    """A local folder that holds these files of a checkpoint, each compared with its checksum.

    A checkpoint on a disk is used where it is; of one in an object store the files are copied to this node, once
    for all its processes.

    Raises:
        CheckpointError: a file is missing or damaged; it is named.
        StorageError: it cannot be read now.
    """
    if checkpoint.local is not None:
        for entry in files:
            check_file(checkpoint.local / entry.name, entry)
        return checkpoint.local
    folder = cache_folder(checkpoint)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for entry in files:
        _fetch(checkpoint, entry, folder)
    return folder


def cache_folder(checkpoint: Storage) -> Path:
    """Where this node keeps copies of a checkpoint's files."""
    root = os.environ.get("XDG_CACHE_HOME") or (Path.home() / ".cache")
    place = re.sub(r"[^A-Za-z0-9._-]+", "_", checkpoint.uri)
    return Path(root) / "moe_ray" / place


def resolve_checkpoint(
    run_or_checkpoint: str | Path, kinds: frozenset[str] = _FOR_INFERENCE
) -> tuple[Path, Manifest]:
    """A given checkpoint, or the newest good one of a given run, with its files of these kinds at hand.

    Raises:
        CheckpointError: there is none, or the given one is damaged.
        StorageError: the storage cannot be read now.
    """
    storage = open_storage(run_or_checkpoint)
    if storage.exists(MANIFEST):
        manifest = read_manifest(storage)
        return open_files(storage, _of_kinds(manifest, kinds)), manifest
    steps = list_steps(storage)
    for step in reversed(steps):
        try:
            manifest = read_step(storage, step)
            return open_files(storage.child(checkpoint_name(step)), _of_kinds(manifest, kinds)), manifest
        except CheckpointError as error:
            _logger.warning("skipping a checkpoint: %s", error.problem)
    if steps:
        raise all_damaged(storage, len(steps))
    exists = storage.local is None or storage.local.is_dir()
    raise CheckpointError(
        f"checkpoint={str(run_or_checkpoint)!r} {'holds no checkpoint' if exists else 'does not exist'}.",
        "give a run folder that has checkpoints/, or one of its checkpoints/step-* folders.",
    )


def all_damaged(run: Storage, count: int) -> CheckpointError:
    """The error of a run that has checkpoints, none of them good."""
    return CheckpointError(
        f"all {count} checkpoints in {run.uri!r} are damaged.",
        "restore one from a backup, or choose another train.name to start again.",
    )


def tidy(run: Storage, step: int) -> dict[int, Mapping[str, float]]:
    """Make the checkpoint of `step` (0: none) the newest one. Only the one writer of the run may call this.

    What a killed writer left is removed. Later checkpoints were passed over because they are damaged: like those
    whose manifest is, they lose their names, so that they neither count as newest nor push out good ones, but are
    kept for a look at them until their step is saved again.

    Returns:
        The metrics of each checkpoint that is left, by step.
    """
    run.clean()
    metrics: dict[int, Mapping[str, float]] = {}
    for found, names in _folders(run).items():
        folder = checkpoint_name(found)
        if MANIFEST in names:
            manifest = _read_good(run, found) if found <= step else None
            if manifest is None:
                run.write(f"{folder}/{DAMAGED}", run.read(f"{folder}/{MANIFEST}"))
                run.delete(f"{folder}/{MANIFEST}")
            else:
                drop_unlisted(run, manifest, names)
                metrics[found] = manifest.metrics
        elif DAMAGED not in names:
            run.delete(folder)
    return metrics


def drop_unlisted(run: Storage, manifest: Manifest, names: Iterable[str]) -> None:
    """Delete those of the files in a checkpoint's folder that are no part of it."""
    folder = checkpoint_name(manifest.step)
    for name in set(names) - {MANIFEST, *(entry.name for entry in manifest.files)}:
        run.delete(f"{folder}/{name}")


def remove(run: Storage, step: int) -> None:
    """Delete a checkpoint; it ends to be one before its first file goes."""
    folder = checkpoint_name(step)
    run.delete(f"{folder}/{MANIFEST}")
    run.delete(folder)


def _folders(run: Storage) -> dict[int, set[str]]:
    """File names in each folder that is named like a checkpoint, by step."""
    folders: dict[int, set[str]] = {}
    for name in run.list(CHECKPOINTS):
        parts = name.split("/")
        if len(parts) == 3 and (match := _NAME.fullmatch(parts[1])):
            folders.setdefault(int(match[1]), set()).add(parts[2])
    return folders


def _read_good(run: Storage, step: int) -> Manifest | None:
    try:
        return read_step(run, step)
    except CheckpointError as error:
        _logger.warning("skipping a checkpoint: %s", error.problem)
        return None


def _of_kinds(manifest: Manifest, kinds: frozenset[str]) -> list[FileEntry]:
    return [entry for entry in manifest.files if entry.kind in kinds]


def _shown(checkpoint: Storage) -> str:
    return checkpoint.uri.partition("?")[0]


def _fetch(checkpoint: Storage, entry: FileEntry, folder: Path) -> None:
    target, where = folder / entry.name, f"{_shown(checkpoint)}/{entry.name}"
    if target.is_file():
        try:
            return check_file(target, entry)
        except CheckpointError:
            target.unlink(missing_ok=True)
    descriptor, staged = tempfile.mkstemp(dir=folder, prefix=".fetch-")
    os.close(descriptor)
    try:
        checkpoint.fetch(entry.name, Path(staged))
        check_file(Path(staged), entry, where)
        os.replace(staged, target)
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint file {where!r} is missing.", "use another checkpoint of the run."
        ) from None
    finally:
        Path(staged).unlink(missing_ok=True)
