"""A lock on a folder that ends with its process, however that ends."""

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from moe_ray.errors import StorageError
from moe_ray.storage.base import LOCK
from moe_ray.storage.staged import make_folder


@contextmanager
def try_lock(folder: Path | None) -> Generator[bool | None]:
    """Hold the lock of a folder, which is created if need be, while the block runs.

    Yields:
        True: it is held; False: another process has it; None: there are no locks here, as in an object store.

    Raises:
        StorageError: the folder cannot be written to.
    """
    if folder is None:
        yield None
        return
    try:
        make_folder(folder)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise StorageError(
            f"{str(folder / LOCK)!r} could not be created: {error.strerror}.",
            "check the address of the storage and that you may write there.",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held = False
        except OSError:
            # Some network file systems have no locks.
            held = None
        else:
            held = True
        yield held
