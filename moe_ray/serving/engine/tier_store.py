"""Bytes by digest in two tiers, memory above disk, each under a byte budget.

All that is in memory is on disk too, so what a tier drops costs nothing but time.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from moe_ray.serving.engine.disk_tier import DiskTier


@dataclass(frozen=True)
class Tiering:
    """What the tiers may take.

    Attributes:
        memory_bytes: of compressed items in memory; 0: none are kept there.
        folder: of those on disk; None: none are.
        disk_bytes: of all that is kept in the folder.
        prefetch: whether what is likely to be asked for next is brought from disk into memory.
    """

    memory_bytes: int = 0
    folder: Path | None = None
    disk_bytes: int = 0
    prefetch: bool = False

    def __bool__(self) -> bool:
        """Whether anything is kept."""
        return self.memory_bytes > 0 or self.folder is not None


class MemoryTier:
    """Bytes by digest; what was used least recently goes first. Used by one thread.

    Attributes:
        num_bytes: held now.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._items: OrderedDict[bytes, bytes] = OrderedDict()
        self.num_bytes = 0

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._items

    def get(self, digest: bytes) -> bytes | None:
        """What was put, if it is still there."""
        data = self._items.get(digest)
        if data is not None:
            self._items.move_to_end(digest)
        return data

    def put(self, digest: bytes, data: bytes) -> None:
        """Keep what is not there yet, unless it alone is beyond the budget."""
        if self.get(digest) is not None or len(data) > self._budget:
            return
        self._items[digest] = data
        self.num_bytes += len(data)
        while self.num_bytes > self._budget:
            self.num_bytes -= len(self._items.popitem(last=False)[1])


class TierStore:
    """Memory above disk; used by one thread, but its attributes may be read by others.

    Attributes:
        memory, disk: the tiers.
        memory_hits, disk_hits: of `get`, by where it was.
    """

    def __init__(self, tiering: Tiering) -> None:
        self._keeps_in_memory = tiering.memory_bytes > 0
        self.memory = MemoryTier(tiering.memory_bytes)
        self.disk = None if tiering.folder is None else DiskTier(tiering.folder, tiering.disk_bytes)
        self.memory_hits = 0
        self.disk_hits = 0

    def get(self, digest: bytes) -> bytes | None:
        """What was put; from disk it goes into memory too."""
        data = self.memory.get(digest)
        if data is not None:
            self.memory_hits += 1
        elif (data := self._from_disk(digest)) is not None:
            self.disk_hits += 1
        return data

    def prefetch(self, digest: bytes) -> bool:
        """Bring what is only on disk into memory; returns whether it did."""
        return self.memory.get(digest) is None and self._from_disk(digest) is not None and digest in self.memory

    def touch(self, digest: bytes) -> bool:
        """Whether there is nothing left to put, as all tiers have it."""
        in_memory = not self._keeps_in_memory or self.memory.get(digest) is not None
        return in_memory and (self.disk is None or digest in self.disk)

    def put(self, digest: bytes, data: bytes) -> None:
        """Keep `data` in each tier that has not yet got it."""
        self.memory.put(digest, data)
        if self.disk is not None and digest not in self.disk:
            self.disk.put(digest, data)

    def _from_disk(self, digest: bytes) -> bytes | None:
        data = None if self.disk is None else self.disk.get(digest)
        if data is not None:
            self.memory.put(digest, data)
        return data
