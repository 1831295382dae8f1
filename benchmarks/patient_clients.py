"""Closed-loop HTTP clients that come and go, note every answer, and try again as the `openai` client does."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

LOOPBACK = "127.0.0.1"
# Those of openai.OpenAI(max_retries=2).
_TRIES = 3
_RETRIED = {408, 409, 429}
_FIRST_PAUSE, _MAX_PAUSE, _MAX_RETRY_AFTER = 0.5, 8.0, 60.0
# An answer that takes longer counts as lost.
_PATIENCE_SECONDS = 120.0


@dataclass
class Answers:
    """What all clients have seen.

    Attributes:
        latencies: (time of the answer, seconds that it took) of successes.
        failures: by kind: the status, or how there was none.
        given_up: requests that failed after all tries, by kind of the last failure.
        samples: the beginning of one failure of each kind.
    """

    latencies: list[tuple[float, float]] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    given_up: Counter[str] = field(default_factory=Counter)
    samples: dict[str, str] = field(default_factory=dict)


class Crowd:
    """A number of clients that can be changed at any time.

    Args:
        requests: sent in turn by all clients, as they go over the wire.
        think_seconds: mean pause of a client between an answer and its next request.
    """

    def __init__(self, port: int, requests: Sequence[bytes], think_seconds: float) -> None:
        self._port = port
        self._turn = itertools.cycle(requests)
        self._think_seconds = think_seconds
        self._rng = np.random.default_rng(0)
        self._tasks: list[asyncio.Task[None]] = []
        self._wanted = 0
        self.answers = Answers()

    async def resize(self, clients: int) -> None:
        """Let clients come, or go after their current request."""
        self._wanted = clients
        running = [task for task in self._tasks if not task.done()]
        if len(running) > clients:
            await asyncio.gather(*running[clients:])
        new = range(len(running), clients)
        self._tasks = running[:clients] + [asyncio.create_task(self._run(number)) for number in new]

    async def _run(self, number: int) -> None:
        connection = _Connection(self._port)
        while number < self._wanted:
            await self._request(connection, next(self._turn))
            # Pauses that are all equal would keep the clients in step.
            await asyncio.sleep(self._rng.uniform(0, 2 * self._think_seconds))
        connection.close()

    async def _request(self, connection: "_Connection", request: bytes) -> None:
        kind = ""
        for tries in range(_TRIES):
            began = time.perf_counter()
            answer = await connection.ask(request)
            if answer.status == 200:
                now = time.perf_counter()
                self.answers.latencies.append((now, now - began))
                return
            kind = answer.kind
            self.answers.failures[kind] += 1
            self.answers.samples.setdefault(kind, answer.text)
            if answer.status is not None and answer.status not in _RETRIED and answer.status < 500:
                break
            if tries < _TRIES - 1:
                await asyncio.sleep(self._pause(tries, answer.retry_after))
        self.answers.given_up[kind] += 1

    def _pause(self, tries: int, retry_after: float | None) -> float:
        if retry_after is not None and retry_after <= _MAX_RETRY_AFTER:
            return retry_after
        return min(_FIRST_PAUSE * 2**tries, _MAX_PAUSE) * (1 - self._rng.random() / 4)


@dataclass(frozen=True)
class _Answer:
    status: int | None
    text: str
    retry_after: float | None = None

    @property
    def kind(self) -> str:
        return self.text if self.status is None else str(self.status)


class _Connection:
    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> _Answer:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await self._ask(request)
        except TimeoutError:
            kind = "no answer"
        except asyncio.IncompleteReadError as error:
            kind = "cut answer" if error.partial else "empty answer"
        except OSError as error:
            kind = type(error).__name__
        self.close()
        return _Answer(None, kind)

    async def _ask(self, request: bytes) -> _Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection(LOOPBACK, self._port)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
        body = await reader.readexactly(int(fields["content-length"]))
        if fields.get("connection") == "close":
            self.close()
        retry_after = fields.get("retry-after")
        text = body[:300].decode(errors="replace")
        return _Answer(int(head[9:12]), text, float(retry_after) if retry_after else None)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
