"""A file of experts: records of one size, layer after layer, each with a checksum that is kept elsewhere.

The file is read with system calls and never mapped: one that was cut off is an error here, where a mapping would
end the process. Reads go past the page cache where the file system allows it, so that the memory of experts is
that of their slots, and a read costs a quarter of the processor time.
"""

import contextlib
import errno
import io
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from moe_ray.errors import CheckpointError, StorageError
from moe_ray.offload.record import Record

_DIRECT = getattr(os, "O_DIRECT", 0)


class ExpertFile:
    """Reads records; all methods may be called by several threads.

    Args:
        checksums: of the records, in the order of the file.

    Raises:
        StorageError: the file cannot be opened.
    """

    def __init__(self, path: Path, record_bytes: int, checksums: list[int]) -> None:
        self._path = path
        self._record_bytes = record_bytes
        self._checksums = checksums
        self._file = _open(path)

    def read(self, index: int, memory: memoryview) -> None:
        """Fill the memory of a slot, which begins at a page, with a record, and verify it.

        A file that is damaged loses its name, so that the next start makes it anew.

        Raises:
            CheckpointError: the record is damaged, or the file was cut off.
            StorageError: the disk refused to read.
        """
        try:
            count = os.preadv(self._file.fileno(), [memory], index * self._record_bytes)
        except OSError as error:
            raise StorageError(f"cannot read {str(self._path)!r}: {error}.", "look at the disk.") from error
        if count != self._record_bytes or checksum(memory) != self._checksums[index]:
            with contextlib.suppress(OSError):
                self._path.unlink()
            raise CheckpointError(
                f"{str(self._path)!r}, the experts of a replica, was damaged while it was used.",
                "start the replica again: it makes the file anew.",
            )


def write_experts(path: Path, record: Record, experts: Iterable[dict[str, Tensor]]) -> list[int]:
    """Write the records of all experts in order, whole or not at all; returns their checksums.

    Holds one expert at a time.

    Raises:
        OSError: there is no room, or no right to write.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    memory = torch.empty(record.num_bytes, dtype=torch.uint8)
    checksums = []
    try:
        with open(unfinished, "wb", opener=_open_private) as file:
            for tensors in experts:
                record.fill(memory, tensors)
                checksums.append(checksum(memory.numpy().data))
                file.write(memory.numpy().data)
            file.flush()
            # The kernel would keep what was written instead of what is used.
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return checksums


def checksum(memory: memoryview) -> int:
    """XXH3 of a record as int64, some 10 GB/s."""
    digest = xxhash.xxh3_64_intdigest(memory)
    return digest - (digest >> 63 << 64)


def _open(path: Path) -> io.FileIO:
    try:
        return io.FileIO(path, opener=lambda name, flags: os.open(name, flags | _DIRECT))
    except OSError as error:
        # A file system without such reads, such as an old tmpfs.
        if error.errno == errno.EINVAL:
            return io.FileIO(path)
        raise StorageError(
            f"cannot open {str(path)!r}, the experts of a replica: {error}.", "start the replica again."
        ) from error


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
