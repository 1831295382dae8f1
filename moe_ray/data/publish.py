"""A folder appears whole or not at all: written aside under a lock, then renamed into place."""

import errno
import fcntl
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from moe_ray.errors import DataError, StorageError

logger = logging.getLogger(__name__)

_ATTEMPTS = 10
_ASIDE = re.compile(r"\.(.+)\.(new|old)-[0-9a-f]{12}")


@contextmanager
def exclusive(folder: Path) -> Generator[None]:
    """Hold the lock of `folder`, waiting for a process that has it, and clean up after dead ones beside it.

    The lock is a file beside the folder that the system releases with its process, however it ends. Where the
    file system has no locks nothing waits and nothing is cleaned; `publish` is safe without.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock_path(folder).open("a") as lock:
        try:
            if not _try_lock(lock):
                logger.info("waiting for another process that prepares %s", folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            _clean(folder)
            _clean_others(folder)
        except OSError as error:
            logger.warning("no lock in %s: %s", folder.parent, error.strerror)
        yield


@contextmanager
def staging(folder: Path) -> Generator[Path]:
    """An empty folder beside `folder`, on the same file system; gone at the end unless it was published."""
    aside = _beside(folder, "new")
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish(aside: Path, folder: Path, is_current: Callable[[Path], bool]) -> None:
    """Rename `aside` to `folder`. Another folder there is renamed away first and deleted after.

    Args:
        is_current: whether a folder is as good as ours; then it stays and ours is given up.

    Raises:
        OSError: the file system refuses; what was at `folder` is still there.
    """
    _sync_folder(aside)
    for _ in range(_ATTEMPTS):
        if _take_place(aside, folder) or is_current(folder):
            return
        old = _beside(folder, "old")
        try:
            os.rename(folder, old)
        except FileNotFoundError:
            continue
        try:
            taken = _take_place(aside, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
        if taken:
            return
    raise FileExistsError(errno.EEXIST, "other processes keep replacing it", str(folder))


@contextmanager
def storage_errors(folder: Path) -> Generator[None]:
    """Turn an OSError into a StorageError that names `folder` and, if the disk is full, the bytes free."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing(folder)).free
            raise StorageError(
                f"no space left for {folder}: {free} bytes are free there.",
                "free space, or set train.storage or data.path to a larger disk.",
            ) from error
        where = f" ({error.filename})" if error.filename else ""
        raise StorageError(
            f"cannot write {folder}: {error.strerror}{where}.",
            "make it writable, or set train.storage or data.path to a subfolder of one that is.",
        ) from error


def refuse_foreign(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Raise a DataError if `folder` is a file or holds anything but our files, for it would be deleted."""
    try:
        strange = next((path for path in sorted(folder.iterdir()) if not is_ours(path.name)), None)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        strange = folder if folder.exists() else None
    if strange is not None:
        raise DataError(
            f"{folder} is not only prepared data (there is {strange}), so it is not replaced.",
            "set data.path to a new or empty folder.",
        )


def _take_place(aside: Path, folder: Path) -> bool:
    """Rename unless a folder with content is there."""
    try:
        os.rename(aside, folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    _sync_folder(folder.parent)
    return True


def _clean_others(folder: Path) -> None:
    names = {match[1] for path in folder.parent.iterdir() if (match := _ASIDE.fullmatch(path.name))}
    for name in names - {folder.name}:
        other = folder.parent / name
        with _lock_path(other).open("a") as lock:
            if _try_lock(lock):
                _clean(other)


def _clean(folder: Path) -> None:
    """Delete what a dead process left aside; a folder that it had renamed away, and only that, comes back."""
    for path in folder.parent.iterdir():
        match = _ASIDE.fullmatch(path.name)
        if match and match[1] == folder.name:
            if match[2] == "old" and not folder.exists():
                os.rename(path, folder)
            else:
                shutil.rmtree(path, ignore_errors=True)


def _lock_path(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _beside(folder: Path, kind: str) -> Path:
    return folder.parent / f".{folder.name}.{kind}-{uuid.uuid4().hex[:12]}"


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
