"""Closed-loop HTTP clients that cost little: callbacks on raw connections, no task and no parser a request.

A client keeps its connection and sends the next request when an answer is whole. A lost connection, or an answer
whose status is not 200, counts as a failure; the client then connects anew.
"""

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

_END_OF_CHUNKS = b"0\r\n\r\n"
_EVENT = b"data: "


@dataclass
class Load:
    """What a round has seen; all times in seconds.

    Attributes:
        latencies: from the first byte sent to the last received.
        first: to the first event of a stream.
        gaps: mean time between the tokens of a stream after the first.
        failures: descriptions.
        seconds: of the round, until the last answer.
    """

    latencies: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def post(path: str, port: int, body: bytes) -> bytes:
    """A POST request with a JSON body, as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def run_load(port: int, requests: Sequence[bytes], clients: int, seconds: float, tokens: int) -> Load:
    """Send requests in turn from all clients for some seconds, and wait for the last answers.

    Args:
        tokens: of each streamed answer.
    """
    load, turn = Load(), itertools.cycle(requests)
    began = time.perf_counter()
    tasks = [_run_client(port, turn, began + seconds, load, tokens) for _ in range(clients)]
    await asyncio.gather(*tasks)
    load.seconds = time.perf_counter() - began
    return load


async def _run_client(port: int, turn: Iterator[bytes], end: float, load: Load, tokens: int) -> None:
    loop = asyncio.get_running_loop()
    while time.perf_counter() < end:
        client = _Client(turn, end, load, tokens, loop.create_future())
        try:
            await loop.create_connection(partial(_same, client), "127.0.0.1", port)
        except OSError as error:
            load.failures.append(str(error))
            await asyncio.sleep(0.1)
        else:
            await client.done


class _Client(asyncio.Protocol):
    def __init__(
        self, turn: Iterator[bytes], end: float, load: Load, tokens: int, done: asyncio.Future[None]
    ) -> None:
        self._turn, self._end, self._load, self._tokens, self.done = turn, end, load, tokens, done
        self._is_waiting = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's has the methods and not the type.
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._size < 0:
            head, found, _ = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            self._read_head(head)
        if self._first is None and _EVENT in self._buffer:
            self._first = time.perf_counter()
        if self._is_chunked:
            if self._buffer.endswith(_END_OF_CHUNKS):
                self._finish()
        elif len(self._buffer) >= self._size:
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._is_waiting:
            self._load.failures.append(f"the connection was lost: {exc}")
        if not self.done.done():
            self.done.set_result(None)

    def _send(self) -> None:
        self._buffer, self._size, self._is_chunked = b"", -1, False
        self._first: float | None = None
        self._is_waiting = True
        self._sent = time.perf_counter()
        self._transport.write(next(self._turn))

    def _read_head(self, head: bytes) -> None:
        fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
        self._is_chunked = b"chunked" in fields.get(b"transfer-encoding", b"")
        self._size = len(head) + 4 + int(fields.get(b"content-length", b"0"))

    def _finish(self) -> None:
        now = time.perf_counter()
        self._is_waiting = False
        if self._buffer[9:12] == b"200" and (not self._is_chunked or _is_whole(self._buffer)):
            self._load.latencies.append(now - self._sent)
            if self._first is not None:
                self._load.first.append(self._first - self._sent)
                self._load.gaps.append((now - self._first) / max(self._tokens - 1, 1))
        else:
            self._load.failures.append(self._buffer[:300].decode(errors="replace"))
        if now < self._end:
            self._send()
        else:
            self._transport.close()


def _same(client: _Client) -> _Client:
    return client


def _is_whole(answer: bytes) -> bool:
    return _EVENT not in answer or b"data: [DONE]" in answer
