"""Prefix blocks that the KV cache has no room for: compressed in memory, and on disk beyond a restart.

The engine hands over what it evicts and asks for what a new prompt could use; a thread compresses, reads and
writes. All that is in memory is on disk too, so what a tier drops costs nothing but time.
"""

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from moe_ray.serving.engine.disk_tier import DiskTier
from moe_ray.serving.engine.stats import TierStats

# Blocks that wait to be compressed; more than these are dropped, so that memory stays bounded.
_MAX_QUEUED = 256
_CODEC = "lz4"

_logger = logging.getLogger(__name__)

Blocks = dict[bytes, np.ndarray]


@dataclass(frozen=True)
class Tiering:
    """What the tiers may take.

    Attributes:
        memory_bytes: of compressed blocks in memory; 0: none are kept there.
        folder: of those on disk; None: none are.
        disk_bytes: of all files in the folder.
    """

    memory_bytes: int = 0
    folder: Path | None = None
    disk_bytes: int = 0


class PrefixTiers:
    """Blocks of uint8 by digest. `put`, `fetch` and `loaded` never wait for the disk.

    Args:
        block_bytes: of one block, not compressed.
        item_bytes: of one number; bytes of equal weight lie together when they are compressed.
        tiering: budgets.
    """

    def __init__(self, block_bytes: int, item_bytes: int, tiering: Tiering) -> None:
        self._block_bytes = block_bytes
        self._item_bytes = item_bytes
        self._memory_budget = tiering.memory_bytes
        self._memory: OrderedDict[bytes, bytes] = OrderedDict()
        self._memory_bytes = 0
        self._disk = None if tiering.folder is None else DiskTier(tiering.folder, tiering.disk_bytes)
        self._memory_hits = self._disk_hits = self._misses = self._dropped = 0
        self._queued_blocks = threading.Semaphore(_MAX_QUEUED)
        self._work: queue.SimpleQueue[tuple[object, tuple[bytes, ...]] | tuple[bytes, np.ndarray] | None]
        self._work = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[tuple[object, Blocks]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prefix-tiers", daemon=True)
        self._thread.start()

    def put(self, digest: bytes, block: np.ndarray, *, wait: bool = False) -> None:
        """Keep a block; if too many wait already, drop it or wait for them."""
        if self._queued_blocks.acquire(blocking=wait):
            self._work.put((digest, block))
        else:
            self._dropped += 1

    def fetch(self, key: object, digests: Iterable[bytes]) -> None:
        """Ask for the leading digests that are known; `loaded` gives them under the key."""
        self._work.put((key, tuple(digests)))

    def loaded(self, timeout: float) -> list[tuple[object, Blocks]]:
        """The answers that have come, of which the first is waited for up to `timeout` seconds."""
        answers = []
        try:
            answers.append(self._loaded.get(block=timeout > 0, timeout=timeout or None))
            while True:
                answers.append(self._loaded.get_nowait())
        except queue.Empty:
            return answers

    def stats(self) -> TierStats:
        """Counts since the start and bytes now."""
        disk = self._disk
        return TierStats(
            tier_memory_hits=self._memory_hits,
            tier_disk_hits=self._disk_hits,
            tier_misses=self._misses,
            tier_memory_bytes=self._memory_bytes,
            tier_disk_bytes=disk.num_bytes if disk else 0,
            tier_dropped=self._dropped,
            tier_damaged=disk.damaged if disk else 0,
            tier_errors=disk.errors if disk else 0,
        )

    def close(self) -> None:
        """Finish what was put and end the thread."""
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            key, value = item
            if isinstance(value, tuple):
                self._loaded.put((key, self._load_or_nothing(value)))
            else:
                assert isinstance(key, bytes)
                self._store(key, value)
                self._queued_blocks.release()

    def _store(self, digest: bytes, block: np.ndarray) -> None:
        known = digest in self._memory
        on_disk = self._disk is None or digest in self._disk
        if known and on_disk:
            self._memory.move_to_end(digest)
            return
        data = self._memory[digest] if known else self._compress(block)
        self._remember(digest, data)
        if self._disk is not None and not on_disk:
            self._disk.put(digest, data)

    def _load_or_nothing(self, digests: tuple[bytes, ...]) -> Blocks:
        """A request waits for the answer, so that there must be one."""
        try:
            return self._load(digests)
        except Exception:
            _logger.exception("prefixes could not be read")
            return {}

    def _load(self, digests: tuple[bytes, ...]) -> Blocks:
        blocks: Blocks = {}
        for index, digest in enumerate(digests):
            data, is_in_memory = self._memory.get(digest), True
            if data is None and self._disk is not None:
                data, is_in_memory = self._disk.get(digest), False
            if data is None:
                self._misses += len(digests) - index
                break
            if is_in_memory:
                self._memory_hits += 1
            else:
                self._disk_hits += 1
            self._remember(digest, data)
            blocks[digest] = self._decompress(data)
        return blocks

    def _remember(self, digest: bytes, data: bytes) -> None:
        if digest not in self._memory and len(data) <= self._memory_budget:
            self._memory[digest] = data
            self._memory_bytes += len(data)
        if digest in self._memory:
            self._memory.move_to_end(digest)
        while self._memory_bytes > self._memory_budget:
            self._memory_bytes -= len(self._memory.popitem(last=False)[1])

    def _compress(self, block: np.ndarray) -> bytes:
        assert block.nbytes == self._block_bytes
        shuffled = np.ascontiguousarray(block.reshape(-1, self._item_bytes).T)
        return pa.compress(shuffled, codec=_CODEC, asbytes=True)

    def _decompress(self, data: bytes) -> np.ndarray:
        plain = pa.decompress(data, decompressed_size=self._block_bytes, codec=_CODEC)
        shuffled = np.frombuffer(plain, dtype=np.uint8).reshape(self._item_bytes, -1)
        return np.ascontiguousarray(shuffled.T).reshape(-1)
