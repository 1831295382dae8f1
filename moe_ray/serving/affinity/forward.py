"""Answer a request here, or hand it to the replica that knows its beginning.

A request whose body is short, or comes slowly, costs a look at its headers and stays. For any other one the
directory is asked. What is handed on goes over the other replica's listener, which never hands on again, and
the answer comes back as it arrives. Keys, metrics and the audit log are the business of the replica that
answers.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send
from yarl import URL

from moe_ray.errors import RequestError
from moe_ray.serving.affinity.chain import FIELDS, prefix_chain
from moe_ray.serving.affinity.directory import DirectoryClient
from moe_ray.serving.affinity.router import TEXT_CHUNKS, Choice
from moe_ray.serving.affinity.stats import AffinityStats
from moe_ray.serving.openai.base import to_json
from moe_ray.serving.openai.errors import error_body

# A slower body is left to the routes, which wait longer.
_BODY_SECONDS = 1.0
_CONNECT_SECONDS = 1.0
# Of one connection, and what aiohttp finds out by itself (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect", b"host"}
)
_logger = logging.getLogger(__name__)


class Forwarder:
    """The ASGI application of a replica that has peers.

    Args:
        app: answers here.
        stats: counted up.
        is_free: whether a request with these headers may go elsewhere.
        sizes: bytes of the bodies for which the directory is asked.

    Attributes:
        load: chunks of work here that the directory does not know of.
    """

    def __init__(
        self,
        app: Any,
        directory: DirectoryClient,
        stats: AffinityStats,
        is_free: Callable[[Headers], bool],
        sizes: range,
    ) -> None:
        self._app, self._directory, self._stats = app, directory, stats
        self._is_free, self._sizes = is_free, sizes
        self.load = 0.0
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    @property
    def routes(self) -> Sequence[Any]:
        """Those of the application; Serve names requests by them."""
        return self._app.routes

    @property
    def router(self) -> Any:
        """The application's, for the same."""
        return self._app.router

    async def close(self) -> None:
        """Give up the connections to other replicas."""
        await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if not self._is_candidate(scope):
            await self._answer_unasked(scope, receive, send)
            return
        messages = await _read(receive)
        body = _join(messages)
        again = _replay(messages, receive)
        chain = prefix_chain(body, FIELDS[_path(scope)])
        choice = await self._directory.choose(chain) if chain else None
        if choice is None:
            self._stats.affinity_unasked += bool(chain)
            await self._answer_unasked(scope, again, send)
            return
        try:
            if choice.replica != self._directory.replica:
                if await self._hand(choice, scope, body, receive, send):
                    return
                self._stats.affinity_unreached += 1
                self._directory.keep(choice, chain)
            self._stats.affinity_kept += 1
            await self._app(scope, again, send)
        finally:
            self._directory.finish(choice)

    async def _answer_unasked(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = TEXT_CHUNKS if scope["type"] == "http" and _path(scope) in FIELDS else 0.0
        self.load += work
        try:
            await self._app(scope, receive, send)
        finally:
            self.load -= work

    def _is_candidate(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) not in FIELDS:
            return False
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        # Ten digits at most: int() of many takes long.
        is_number = length.isascii() and length.isdigit() and len(length) <= 10
        return is_number and int(length) in self._sizes and self._is_free(headers)

    async def _hand(self, choice: Choice, scope: Scope, body: bytes, receive: Receive, send: Send) -> bool:
        """Whether another replica has begun to answer, or the client has left."""
        relaying = asyncio.create_task(self._relay(choice, scope, body, send))
        leaving = asyncio.create_task(_wait_until_left(receive))
        try:
            await asyncio.wait((relaying, leaving), return_when=asyncio.FIRST_COMPLETED)
            return relaying.result() if relaying.done() else True
        finally:
            # Closes the connection to the other replica, which then stops too.
            relaying.cancel()
            leaving.cancel()
            await asyncio.gather(relaying, leaving, return_exceptions=True)

    async def _relay(self, choice: Choice, scope: Scope, body: bytes, send: Send) -> bool:
        """Whether the other replica has begun to answer."""
        query = scope["query_string"].decode("latin-1")
        url = URL(f"http://{choice.address}{_path(scope)}?{query}", encoded=True)
        given = [(name, value) for name, value in scope["headers"] if name.lower() not in _HOP_BY_HOP]
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in given]
        answer = None
        try:
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                self._stats.affinity_handed += 1
                fields = [(name, value) for name, value in answer.raw_headers if name.lower() not in _HOP_BY_HOP]
                await send({"type": "http.response.start", "status": answer.status, "headers": fields})
                async for data in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        except aiohttp.ClientError as error:
            if answer is not None:
                self._stats.affinity_broken += 1
                await _break_off(answer, error, send)
                return True
            # A text that was begun and not answered has changed nothing, so it may be begun again.
            _logger.warning("the replica %s did not answer: %r", choice.replica, error)
            return False
        await send({"type": "http.response.body", "body": b""})
        return True


async def _break_off(answer: aiohttp.ClientResponse, error: Exception, send: Send) -> None:
    if answer.content_type != "text/event-stream":
        raise RuntimeError("the replica that answered is gone") from error
    problem = RequestError("the replica that answered is gone.", "try again.", status=500)
    # The first line break ends an event that was cut, which no reader takes for a whole one then.
    event = b"\n\ndata: " + to_json(error_body(problem)) + b"\n\n"
    await send({"type": "http.response.body", "body": event})


async def _read(receive: Receive) -> list[Message]:
    """The messages of a body, as far as they came in time."""
    messages: list[Message] = []
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BODY_SECONDS):
            while not messages or messages[-1].get("more_body"):
                messages.append(await receive())
    return messages


def _join(messages: Sequence[Message]) -> bytes:
    """The body; empty if it is not whole."""
    is_whole = bool(messages) and messages[-1]["type"] == "http.request" and not messages[-1].get("more_body")
    return b"".join(message.get("body", b"") for message in messages) if is_whole else b""


def _replay(messages: Sequence[Message], receive: Receive) -> Receive:
    """Receives what was read, and then what comes after it."""
    read = iter(messages)

    async def again() -> Message:
        message = next(read, None)
        return await receive() if message is None else message

    return again


def _path(scope: Scope) -> str:
    return scope["path"].removeprefix(scope.get("root_path", ""))


async def _wait_until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
