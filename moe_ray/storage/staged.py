"""Files on a disk that appear whole or not at all."""

import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from moe_ray.durable import sync
from moe_ray.storage.base import TEMPORARY_PREFIX


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process chooses."""
    return path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")


@contextmanager
def staged(target: Path) -> Generator[Path]:
    """A path to write to; at the end it becomes `target`, durably, or on an exception is removed."""
    staging = temporary(target)
    try:
        yield staging
        sync(staging)
        staging.replace(target)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync(target.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and those it is in, durably; fine if it exists."""
    if not folder.is_dir():
        make_folder(folder.parent)
        try:
            folder.mkdir()
        except FileExistsError:
            # Another process was faster. If it has removed it again, whoever writes there finds it missing.
            if folder.is_file():
                raise
        sync(folder.parent)
