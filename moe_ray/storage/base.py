"""What every kind of storage can do, and the names of files in it."""

from pathlib import Path
from typing import Protocol

from moe_ray.errors import StorageError

TEMPORARY_PREFIX = ".tmp-"
LOCK = ".lock"


class Storage(Protocol):
    """A folder of files.

    Names are relative, with `/` between folders. Transient errors are retried, and after many in a row operations
    fail at once for a while. Storages can be used by several threads; another process opens its own from `uri`.

    Every method raises `StorageError` where storage fails or a name leads out of it.
    """

    @property
    def uri(self) -> str:
        """Where it is, without credentials; `open_storage` accepts it."""
        ...

    @property
    def local(self) -> Path | None:
        """The folder, where it is one of this machine's file systems."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Create or replace a file, durably and whole or not at all, and its folders with it."""
        ...

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to `target` on a disk, whole or not at all, and without holding it in memory.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def list(self, folder: str = "") -> list[str]:
        """Sorted names, from here, of all files in a folder and those in it; none if it does not exist."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such a file; folders are not files."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file or a folder with all in it, if it exists, and the folders that this leaves empty.

        A folder of a disk disappears at once; in an object store file by file.
        """
        ...

    def child(self, folder: str) -> "Storage":
        """The storage of a folder in this one; whether or not it exists yet."""
        ...

    def clean(self) -> None:
        """Remove what killed writers left behind, empty folders included.

        Only while nobody else writes: it may be theirs.
        """
        ...


def checked(name: str) -> str:
    """The name, if it stays within its storage.

    Raises:
        StorageError: it is absolute, has empty parts, `.` or `..`, or is kept for temporary files.
    """
    for part in name.split("/"):
        if part in ("", ".", "..", LOCK) or part.startswith(TEMPORARY_PREFIX) or "\0" in part:
            raise StorageError(
                f"{name!r} cannot name a file of a storage.",
                f"use a relative name; no part of it may be '.', '..', {LOCK} or {TEMPORARY_PREFIX}*.",
            )
    return name
