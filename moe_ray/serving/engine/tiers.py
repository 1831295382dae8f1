"""Prefix blocks that the KV cache has no room for: compressed in memory, and on disk beyond a restart.

The engine hands over what it evicts and asks for what a new prompt could use; a thread compresses, reads and
writes. When it has nothing else to do, it brings blocks into memory that will likely be asked for next.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from moe_ray.serving.engine.stats import TierStats
from moe_ray.serving.engine.successors import Successors
from moe_ray.serving.engine.tier_store import Tiering, TierStore

CODEC = "lz4"
# Blocks that wait to be compressed; more than these are dropped, so that memory stays bounded.
_MAX_QUEUED = 256
# Blocks that wait to be prefetched; the oldest guesses go first.
_MAX_PREFETCHES = 256
# Prefetched blocks to keep in mind before those that memory has dropped again are looked for.
_MAX_UNPROVEN = 4096

_logger = logging.getLogger(__name__)

Blocks = dict[bytes, np.ndarray]


class PrefixTiers:
    """Blocks of uint8 by digest. No method but `loaded` and `close` waits for the disk.

    Args:
        block_bytes: of one block, not compressed.
        item_bytes: of one number; bytes of equal weight lie together when they are compressed.
        tiering: budgets.
    """

    def __init__(self, block_bytes: int, item_bytes: int, tiering: Tiering) -> None:
        self._block_bytes = block_bytes
        self._item_bytes = item_bytes
        self._store = TierStore(tiering)
        self._misses = self._dropped = self._prefetched = self._prefetch_hits = 0
        self._prefetching = tiering.prefetch and tiering.memory_bytes > 0 and tiering.folder is not None
        self._successors = Successors()
        # Both belong to the thread: guesses, and blocks in memory because of one that were not asked for yet.
        self._prefetches: deque[bytes] = deque(maxlen=_MAX_PREFETCHES)
        self._unproven: set[bytes] = set()
        self._queued_blocks = threading.Semaphore(_MAX_QUEUED)
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[tuple[object, Blocks]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prefix-tiers", daemon=True)
        self._thread.start()

    def put(self, digest: bytes, block: np.ndarray, *, wait: bool = False) -> None:
        """Keep a block; if too many wait already, drop it or wait for them."""
        if self._queued_blocks.acquire(blocking=wait):
            self._work.put(partial(self._put, digest, block))
        else:
            self._dropped += 1

    def fetch(self, key: object, digests: Iterable[bytes]) -> None:
        """Ask for the leading digests that are known; `loaded` gives them under the key."""
        self._work.put(partial(self._load, key, tuple(digests)))

    def loaded(self, timeout: float) -> list[tuple[object, Blocks]]:
        """The answers that have come, of which the first is waited for up to `timeout` seconds."""
        answers = []
        try:
            answers.append(self._loaded.get(block=timeout > 0, timeout=timeout or None))
            while True:
                answers.append(self._loaded.get_nowait())
        except queue.Empty:
            return answers

    def follow(self, chain: Sequence[bytes], known: Container[bytes]) -> None:
        """Learn from the blocks of a new prompt, and prefetch those that will likely follow and are not known."""
        if not chain or not self._prefetching:
            return
        self._successors.learn(chain)
        likely = [digest for digest in self._successors.predict(chain[-1]) if digest not in known]
        if likely:
            self._work.put(partial(self._prefetches.extend, likely))

    def stats(self) -> TierStats:
        """Counts since the start and bytes now."""
        memory, disk = self._store.memory, self._store.disk
        return TierStats(
            tier_memory_hits=self._store.memory_hits,
            tier_disk_hits=self._store.disk_hits,
            tier_misses=self._misses,
            tier_prefetched=self._prefetched,
            tier_prefetch_hits=self._prefetch_hits,
            tier_memory_bytes=memory.num_bytes,
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
        while True:
            try:
                work = self._work.get(block=not self._prefetches)
            except queue.Empty:
                work = partial(self._prefetch, self._prefetches.popleft())
            if work is None:
                return
            try:
                work()
            except Exception:
                _logger.exception("the tiers of prefixes failed; the text is computed without them")

    def _put(self, digest: bytes, block: np.ndarray) -> None:
        try:
            if not self._store.touch(digest):
                self._store.put(digest, compress(block, self._item_bytes))
        finally:
            self._queued_blocks.release()

    def _load(self, key: object, digests: tuple[bytes, ...]) -> None:
        blocks: Blocks = {}
        try:
            for index, digest in enumerate(digests):
                self._prefetch_hits += digest in self._unproven and digest in self._store.memory
                self._unproven.discard(digest)
                data = self._store.get(digest)
                if data is None:
                    self._misses += len(digests) - index
                    break
                blocks[digest] = decompress(data, self._block_bytes, self._item_bytes)
        finally:
            # A request waits for the answer, so that there must be one.
            self._loaded.put((key, blocks))

    def _prefetch(self, digest: bytes) -> None:
        if self._store.prefetch(digest):
            self._prefetched += 1
            self._unproven.add(digest)
            if len(self._unproven) > _MAX_UNPROVEN:
                self._unproven = {d for d in self._unproven if d in self._store.memory}


def compress(block: np.ndarray, item_bytes: int) -> bytes:
    """A block of uint8 in fewer bytes."""
    shuffled = np.ascontiguousarray(block.reshape(-1, item_bytes).T)
    return pa.compress(shuffled, codec=CODEC, asbytes=True)


def decompress(data: bytes, block_bytes: int, item_bytes: int) -> np.ndarray:
    """What `compress` was given."""
    plain = pa.decompress(data, decompressed_size=block_bytes, codec=CODEC)
    shuffled = np.frombuffer(plain, dtype=np.uint8).reshape(item_bytes, -1)
    return np.ascontiguousarray(shuffled.T).reshape(-1)
