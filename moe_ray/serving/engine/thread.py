"""Run an engine in a thread of its own and hand its chunks to asyncio."""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from moe_ray.errors import RequestError
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.pace import Pace
from moe_ray.serving.engine.request import Chunk, FinishReason, Request
from moe_ray.serving.engine.service import EngineService
from moe_ray.serving.engine.stats import EngineStats

_logger = logging.getLogger(__name__)
T = TypeVar("T")
# Of Retry-After: a client that comes back may find that others have left.
_MAX_RETRY_SECONDS = 60


@dataclass(frozen=True)
class _Call:
    """A function to run between two steps, and where its result goes."""

    function: Callable[[], Any]
    future: asyncio.Future[Any]

    def run(self) -> None:
        if self.future.cancelled():
            return
        try:
            self._settle(self.future.set_result, self.function())
        except Exception as error:
            self._settle(self.future.set_exception, error)

    def fail(self, error: Exception) -> None:
        self._settle(self.future.set_exception, error)

    def _settle(self, settle: Callable[[Any], None], value: Any) -> None:
        # The event loop may be closed, and the future cancelled in the meantime: nobody reads any more.
        with contextlib.suppress(RuntimeError):
            self.future.get_loop().call_soon_threadsafe(lambda: self.future.done() or settle(value))


class EngineThread:
    """Accepts requests from event loops, at most `max_unfinished` at a time.

    If the engine raises, every unfinished request ends with an error and `is_alive` turns false for good.

    Args:
        max_queue_seconds: requests that would have to wait longer are refused.
    """

    def __init__(self, engine: Engine, max_unfinished: int, max_queue_seconds: float = math.inf) -> None:
        self._engine = engine
        self._max_unfinished = max_unfinished
        self._max_queue_seconds = max_queue_seconds
        # Guards all below; held for microseconds, never while the model runs.
        self._changed = threading.Condition()
        self._commands: deque[Request | str] = deque()
        self._calls: deque[_Call] = deque()
        self._streams: dict[str, Stream] = {}
        self._accepting = True
        self._stats = engine.stats()
        self._pace = Pace()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are accepted."""
        return self._accepting and self._thread.is_alive()

    def check(self, requests: Sequence[Request]) -> None:
        """Raise a RequestError (400) if one cannot be served."""
        for request in requests:
            self._engine.check(request)

    def submit(self, requests: Sequence[Request]) -> "Stream":
        """Queue all requests or none; called from a running event loop.

        Raises:
            RequestError: one cannot be served (400), or there is no room for all, or none in time (503).
        """
        self.check(requests)
        stream = Stream(self, requests, asyncio.get_running_loop())
        with self._changed:
            if not self._accepting:
                raise _unavailable("the engine has stopped.")
            self._check_room(stream, requests[0].deadline)
            self._streams.update((request.id, stream) for request in requests)
            self._commands.extend(requests)
            self._changed.notify()
        return stream

    def _check_room(self, stream: "Stream", deadline: float | None) -> None:
        surplus = len(self._streams) + stream.size - self._max_unfinished
        if surplus > 0:
            raise _unavailable(
                f"{len(self._streams)} requests are running or waiting already.", self._pace.seconds(surplus)
            )
        left = math.inf if deadline is None else max(deadline - time.monotonic(), 0.0)
        allowed = min(self._max_queue_seconds, left)
        wait = self._wait_behind(len(self._streams))
        if wait > allowed:
            # Those of lower priority are passed.
            wait = self._wait_behind(sum(other.priority >= stream.priority for other in self._streams.values()))
        if wait > allowed:
            problem = f"a request that comes now would wait for {wait:.1f} s, and may for {allowed:.1f} s."
            raise _unavailable(problem, wait - allowed)

    def _wait_behind(self, requests: int) -> float:
        """Seconds until one that comes after so many unfinished ones is expected to run."""
        return self._pace.seconds(max(requests - self._stats.running, 0) + 1)

    def cancel(self, request_ids: Sequence[str]) -> None:
        """Drop requests; those that have ended are ignored."""
        with self._changed:
            self._commands.extend(request_ids)
            self._changed.notify()

    async def call(self, function: Callable[[], T]) -> T:
        """Run a function on the engine's thread, at most one between two steps; the model runs nothing meanwhile.

        Keep it short, for it holds up all texts. What it raises is raised here and does not end the engine.

        Raises:
            RequestError: the engine has stopped, or too many calls wait already (503).
        """
        call = _Call(function, asyncio.get_running_loop().create_future())
        with self._changed:
            if not self._accepting:
                raise _unavailable("the engine has stopped.")
            if len(self._calls) >= self._max_unfinished:
                raise _unavailable(f"{len(self._calls)} requests are waiting already.")
            self._calls.append(call)
            self._changed.notify()
        return await call.future

    def stats(self) -> EngineStats:
        """What the engine had done and held before its current step, and requests that it has not yet seen.

        Calls count as requests that wait.
        """
        with self._changed:
            unseen = [command for command in self._commands if isinstance(command, Request)]
            return replace(
                self._stats,
                waiting=self._stats.waiting + len(unseen) + len(self._calls),
                queued_tokens=self._stats.queued_tokens + sum(len(request.prompt_ids) for request in unseen),
            )

    def stop(self) -> None:
        """End all requests with an error and wait for the thread; called from outside it."""
        with self._changed:
            self._accepting = False
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._carry_out_commands():
                self._deliver(self._engine.step())
        except Exception:
            # The chunks of other requests would be lost or wrong: nothing can be saved but the process.
            _logger.exception("the engine failed")
        else:
            self._engine.close()
        finally:
            with self._changed:
                self._accepting = False
                streams = set(self._streams.values())
                self._streams.clear()
                calls = list(self._calls)
                self._calls.clear()
            for call in calls:
                call.fail(_unavailable("the engine has stopped."))
            for stream in streams:
                stream.put_threadsafe([_unavailable("the engine has stopped.")])

    def _carry_out_commands(self) -> bool:
        """Wait for work; returns False to stop."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._commands or self._calls or self._engine.has_work or not self._accepting
            )
            commands = list(self._commands)
            call = self._calls.popleft() if self._calls and self._accepting else None
            self._commands.clear()
            for command in commands:
                if isinstance(command, str):
                    self._streams.pop(command, None)
        for command in commands:
            if isinstance(command, str):
                self._engine.cancel(command)
            else:
                self._engine.submit(command)
        if commands:
            self._stats = self._engine.stats()
        if call is not None:
            call.run()
        return self._accepting

    def _deliver(self, chunks: Sequence[Chunk]) -> None:
        self._stats = self._engine.stats()
        # Each call into an event loop wakes its thread, so all streams of a loop share one.
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Chunk]]] = {}
        with self._changed:
            self._pace.record(self._stats.waiting, sum(chunk.finish_reason is not None for chunk in chunks))
            for chunk in chunks:
                stream = self._streams[chunk.request_id]
                by_loop.setdefault(stream.loop, []).append((stream, chunk))
                if chunk.finish_reason is not None:
                    del self._streams[chunk.request_id]
        for loop, items in by_loop.items():
            _put_threadsafe(loop, items)


class Stream:
    """The chunks of requests that were submitted together, as (index of the request, chunk).

    Iteration ends after the last chunk of the last request. Leaving the context drops what has not ended.

    Attributes:
        loop: where it is read.
        size: how many requests.
        priority: that of all of them.

    Raises:
        RequestError: on iteration, the engine stopped (503), the model failed (500) or the deadline passed (504).
    """

    def __init__(
        self, thread: EngineService, requests: Sequence[Request], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._thread = thread
        self.loop = loop
        self.size = len(requests)
        self.priority = requests[0].priority
        self._index = {request.id: index for index, request in enumerate(requests)}
        self._unfinished = set(self._index)
        self._queue: asyncio.Queue[Chunk | RequestError] = asyncio.Queue()

    def put_threadsafe(self, items: Sequence[Chunk | RequestError]) -> None:
        """Called by other threads than that of the loop."""
        _put_threadsafe(self.loop, [(self, item) for item in items])

    def put(self, item: Chunk | RequestError) -> None:
        """Called in the loop."""
        self._queue.put_nowait(item)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Chunk]]:
        while self._unfinished:
            item = await self._queue.get()
            if isinstance(item, RequestError):
                raise item
            failure = _failure(item.finish_reason)
            if failure is not None:
                raise failure
            if item.finish_reason is not None:
                self._unfinished.discard(item.request_id)
            yield self._index[item.request_id], item

    def cancel(self) -> None:
        """Drop the requests that have not ended."""
        if self._unfinished:
            self._thread.cancel(sorted(self._unfinished))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def _put_threadsafe(loop: asyncio.AbstractEventLoop, items: Sequence[tuple[Stream, Chunk | RequestError]]) -> None:
    def put() -> None:
        for stream, item in items:
            stream.put(item)

    try:
        loop.call_soon_threadsafe(put)
    except RuntimeError:
        # The event loop is closed: nobody reads any more.
        for stream, _ in items:
            stream.cancel()


def _unavailable(problem: str, seconds: float = 0.0) -> RequestError:
    """The error of a request that there may be room for after some seconds."""
    retry_after = min(max(math.ceil(seconds), 1), _MAX_RETRY_SECONDS)
    fix = f"try again in {retry_after} s."
    return RequestError(problem, fix, status=503, code="overloaded", retry_after=retry_after)


def _failure(reason: FinishReason | None) -> RequestError | None:
    """The error that a text ended with, if any."""
    if reason == "error":
        problem = "the model gave numbers that are not finite."
        return RequestError(problem, "serve another checkpoint, or serve.dtype=float32.", status=500)
    if reason == "deadline":
        problem, fix = "the deadline of the request passed.", "allow more time, or try again under less load."
        return RequestError(problem, fix, status=504, code="deadline_exceeded")
    if reason == "grammar":
        problem = "the JSON schema became too complex to follow."
        return RequestError(problem, "simplify it.", param="response_format")
    return None
