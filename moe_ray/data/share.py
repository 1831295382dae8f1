"""Prepared data in an object store: put there once, copied to each node that trains."""

import mmap
from pathlib import Path

from moe_ray.data.publish import exclusive, publish, staging, storage_errors
from moe_ray.data.shards import INDEX_NAME, check_files, read_index
from moe_ray.errors import DataError
from moe_ray.storage import Storage


def share(folder: Path, store: Storage) -> None:
    """Copy a prepared folder to a place named by its digest; what is there already is left as it is.

    Raises:
        StorageError: it could not be written.
    """
    place = _place(store, read_index(folder).digest)
    # The index comes last: its presence says that the others are whole.
    if place.exists(INDEX_NAME):
        return
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: name == INDEX_NAME)
    for name in names:
        place.write(name, _content(folder / name))


def obtain(folder: Path, digest: str, store: Storage) -> Path:
    """The prepared folder with this digest on this node: `folder` if it is here, else a copy beside it.

    Raises:
        DataError: it is neither here nor in the store.
        StorageError: it could not be read, or not be written here.
    """
    if _is_here(folder, digest):
        return folder
    copy = folder.with_name(f"{folder.name}-{digest[:16]}")
    with storage_errors(copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(copy):
            if not _is_here(copy, digest):
                with staging(copy) as aside:
                    _fetch(aside, digest, store)
                    publish(aside, copy, lambda other: _is_here(other, digest))
    return copy


def _fetch(aside: Path, digest: str, store: Storage) -> None:
    place = _place(store, digest)
    if not place.exists(INDEX_NAME):
        raise DataError(
            f"the prepared data is neither on this node nor in {place.uri!r}.",
            "start the job again: it shares it.",
        )
    for name in place.list():
        place.fetch(name, aside / name)
    check_files(aside, read_index(aside), verify=True)


def _place(store: Storage, digest: str) -> Storage:
    return store.child(f"data/{digest[:16]}")


def _is_here(folder: Path, digest: str) -> bool:
    try:
        return read_index(folder).digest == digest
    except DataError:
        return False


def _content(path: Path) -> bytes | memoryview:
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if path.stat().st_size else b""
