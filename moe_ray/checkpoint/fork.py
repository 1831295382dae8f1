"""Begin a run with the state of another."""

import json
import mmap
import tempfile
from pathlib import Path

from moe_ray.checkpoint.catalog import checkpoint_name, read_step
from moe_ray.checkpoint.manifest import MANIFEST, FileEntry, check_file, encode_manifest
from moe_ray.config import Config
from moe_ray.storage import Storage
from moe_ray.telemetry.run_log import METRICS, read_metrics


def fork(source: Storage, step: int, target: Storage, config: Config) -> None:
    """Copy a checkpoint, and what was logged up to it, into another run, which goes on from there.

    Args:
        source: the run that has it.
        step: of the checkpoint.
        target: the run to begin, which is empty.
        config: its settings; the checkpoint's tensors fit them.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        StorageError: storage failed.
    """
    manifest, folder = read_step(source, step), checkpoint_name(step)
    for entry in manifest.files:
        _copy(source.child(folder), entry, target.child(folder))
    logged = [metrics for metrics in read_metrics(source) if metrics["step"] <= step]
    target.write(METRICS, "".join(json.dumps(metrics) + "\n" for metrics in logged).encode())
    changed = manifest.model_copy(update={"config": config.model_dump(mode="json")})
    target.write(f"{folder}/{MANIFEST}", encode_manifest(changed))


def _copy(source: Storage, entry: FileEntry, target: Storage) -> None:
    """Without holding the file in memory."""
    with tempfile.TemporaryDirectory(prefix="moe_ray-fork-") as scratch:
        path = Path(scratch) / entry.name
        source.fetch(entry.name, path)
        check_file(path, entry)
        if entry.size == 0:
            target.write(entry.name, b"")
            return
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as content,
        ):
            target.write(entry.name, content)
