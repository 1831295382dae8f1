"""Finished answers, for requests that would get the same text again: temperature 0, or a seed.

They are kept in three tiers: as they are in memory, compressed in memory, and on disk beyond a restart. A request
is known by a digest of the model, its prompt and all parameters that matter: no answer is taken for another.
"""

import asyncio
import dataclasses
import hashlib
import json
import threading
from array import array
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import pyarrow as pa

from moe_ray.serving.engine.request import Chunk, Request, SamplingParams, TokenLogprob
from moe_ray.serving.engine.service import EngineService
from moe_ray.serving.engine.stats import ResponseStats
from moe_ray.serving.engine.thread import Stream
from moe_ray.serving.engine.tier_store import MemoryTier, Tiering, TierStore

# Of what is stored; another number whenever that or its meaning changes, as disks outlive releases.
_FORMAT = 1
_CODEC = "lz4"
_LENGTH_BYTES = 4
# Answers that wait to be stored; more than these are dropped, so that memory stays bounded.
_MAX_QUEUED = 256


class ResponseCache:
    """Answers requests that an engine has answered before, and gives it all others.

    Args:
        engine: answers what is not known.
        cache_bytes: of answers in memory as they are.
        tiering: budgets of the tiers below.
        identity: of the weights and how they are computed with.
    """

    def __init__(self, engine: EngineService, cache_bytes: int, tiering: Tiering, identity: str) -> None:
        self._engine = engine
        self._root = hashlib.blake2b(f"{_FORMAT} {identity}".encode()).digest()
        # Guards the cache: requests may come from several event loops.
        self._lock = threading.Lock()
        self._cache = MemoryTier(cache_bytes)
        self._cache_hits = self._misses = self._dropped = 0
        self._has_tiers = bool(tiering)
        self._store = TierStore(tiering)
        self._queued = threading.Semaphore(_MAX_QUEUED)
        self._thread = ThreadPoolExecutor(1, "responses")

    async def submit(self, requests: Sequence[Request]) -> "CachedStream":
        """Answer what is known and queue the others, all or none.

        Raises:
            RequestError: one cannot be served (400), or there is no room for all (503).
        """
        self._engine.check(requests)
        keys = [self._key(request) for request in requests]
        found: dict[int, list[Chunk]] = {}
        for index, (request, key) in enumerate(zip(requests, keys, strict=True)):
            chunks = None if key is None else await self._find(key, request)
            if chunks is not None:
                found[index] = chunks
        missing = [index for index in range(len(requests)) if index not in found]
        stream = self._engine.submit([requests[index] for index in missing]) if missing else None
        return CachedStream(self, found, stream, {index: keys[index] for index in missing})

    def store(self, key: bytes, chunks: Sequence[Chunk]) -> None:
        """Keep an answer under its key; never waits."""
        data = _encode(chunks)
        with self._lock:
            self._cache.put(key, data)
        if self._has_tiers:
            self._in_background(key, data)

    def stats(self) -> ResponseStats:
        """Counts since the start and bytes now."""
        store, disk = self._store, self._store.disk
        return ResponseStats(
            response_cache_hits=self._cache_hits,
            response_memory_hits=store.memory_hits,
            response_disk_hits=store.disk_hits,
            response_misses=self._misses,
            response_cache_bytes=self._cache.num_bytes,
            response_memory_bytes=store.memory.num_bytes,
            response_disk_bytes=disk.num_bytes if disk else 0,
            response_dropped=self._dropped,
            response_damaged=disk.damaged if disk else 0,
            response_errors=disk.errors if disk else 0,
        )

    def close(self) -> None:
        """Finish what is being stored. Nothing is called after this."""
        self._thread.shutdown()

    async def _find(self, key: bytes, request: Request) -> list[Chunk] | None:
        with self._lock:
            data = self._cache.get(key)
            self._cache_hits += data is not None
        if data is None and self._has_tiers:
            stored = await asyncio.get_running_loop().run_in_executor(self._thread, self._store.get, key)
            if stored is not None:
                data = _decompress(stored)
                with self._lock:
                    self._cache.put(key, data)
        if data is None:
            self._misses += 1
            return None
        return _decode(data, request)

    def _in_background(self, key: bytes, data: bytes) -> None:
        if not self._queued.acquire(blocking=False):
            self._dropped += 1
            return
        try:
            self._thread.submit(self._put, key, data)
        except RuntimeError:
            # Closed: the last texts ended after the service did.
            self._queued.release()

    def _put(self, key: bytes, data: bytes) -> None:
        try:
            if not self._store.touch(key):
                self._store.put(key, _compress(data))
        finally:
            self._queued.release()

    def _key(self, request: Request) -> bytes | None:
        """None: the text is drawn anew each time."""
        params = request.params
        if params.temperature > 0 and params.seed is None:
            return None
        digest = hashlib.blake2b(self._root, digest_size=32)
        digest.update(_describe(params))
        digest.update(array("q", request.prompt_ids).tobytes())
        return digest.digest()


class CachedStream:
    """As a `Stream`: the known answers, then what the engine gives, which is kept once it is whole.

    Args:
        found: known answers by the indices of their requests.
        stream: of all other requests, in order.
        keys: of these by their indices; None: not to be kept.
    """

    def __init__(
        self,
        cache: ResponseCache,
        found: Mapping[int, Sequence[Chunk]],
        stream: Stream | None,
        keys: Mapping[int, bytes | None],
    ) -> None:
        self._cache = cache
        self._found = found
        self._stream = stream
        self._keys = keys

    async def __aiter__(self) -> AsyncIterator[tuple[int, Chunk]]:
        for index, chunks in self._found.items():
            for chunk in chunks:
                yield index, chunk
        if self._stream is None:
            return
        indices = list(self._keys)
        texts: dict[int, list[Chunk]] = {index: [] for index, key in self._keys.items() if key is not None}
        async for position, chunk in self._stream:
            index = indices[position]
            if (key := self._keys[index]) is not None:
                texts[index].append(chunk)
                if chunk.finish_reason is not None:
                    self._cache.store(key, texts.pop(index))
            yield index, chunk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.cancel()


def _describe(params: SamplingParams) -> bytes:
    """All parameters that the text depends on, behind their length."""
    fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    if params.temperature == 0:
        # Of the most likely token they change nothing.
        del fields["seed"], fields["top_p"], fields["top_k"], fields["min_p"]
    fields["grammar"] = params.grammar and params.grammar.source
    text = json.dumps(fields).encode()
    return len(text).to_bytes(_LENGTH_BYTES) + text


def _encode(chunks: Sequence[Chunk]) -> bytes:
    rows = [
        (c.text, [dataclasses.astuple(lp) for lp in c.logprobs], c.finish_reason, c.num_tokens) for c in chunks
    ]
    return json.dumps(rows, separators=(",", ":")).encode()


def _decode(data: bytes, request: Request) -> list[Chunk]:
    return [
        Chunk(
            request.id,
            text,
            tuple(
                TokenLogprob(token, offset, logprob, tuple((other, value) for other, value in top))
                for token, offset, logprob, top in logprobs
            ),
            finish_reason,
            num_tokens,
            num_cached=len(request.prompt_ids),
        )
        for text, logprobs, finish_reason, num_tokens in json.loads(data)
    ]


def _compress(data: bytes) -> bytes:
    return len(data).to_bytes(_LENGTH_BYTES) + pa.compress(data, codec=_CODEC, asbytes=True)


def _decompress(stored: bytes) -> bytes:
    size = int.from_bytes(stored[:_LENGTH_BYTES])
    return pa.decompress(stored[_LENGTH_BYTES:], decompressed_size=size, codec=_CODEC, asbytes=True)
