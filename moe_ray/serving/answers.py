"""From the chunks of an engine to the body or the events of an answer."""

import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from moe_ray.errors import RequestError
from moe_ray.serving.engine.request import Chunk, Tokenizer
from moe_ray.serving.engine.responses import CachedStream
from moe_ray.serving.engine.thread import Stream
from moe_ray.serving.openai import chat, completions
from moe_ray.serving.openai.base import to_json, usage
from moe_ray.serving.openai.errors import error_body
from moe_ray.serving.openai.sampling import score
from moe_ray.serving.usage import current_usage, new_id

AnyStream = Stream | CachedStream


class Wire(Protocol):
    """How the bodies of a route look."""

    @property
    def id_prefix(self) -> str:
        """What ids of answers begin with."""
        ...

    def choice(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """A choice of a whole answer."""
        ...

    def pieces(self, index: int, chunk: Chunk, is_first: bool) -> list[dict[str, Any]]:
        """Choices of one event each."""
        ...

    def object_name(self, is_event: bool) -> str:
        """The field `object`."""
        ...


@dataclass(frozen=True)
class CompletionWire:
    """That of `/v1/completions`.

    Attributes:
        has_logprobs: whether they were asked for; the engine may give them for other reasons.
    """

    tokenizer: Tokenizer
    has_logprobs: bool
    id_prefix: str = "cmpl"

    def choice(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """A choice of a whole answer."""
        body = completions.choice_body(index, chunks, self.tokenizer)
        return body if self.has_logprobs else {**body, "logprobs": None}

    def pieces(self, index: int, chunk: Chunk, is_first: bool) -> list[dict[str, Any]]:
        """Choices of one event each."""
        return [self.choice(index, [chunk])]

    def object_name(self, is_event: bool) -> str:
        """The field `object`."""
        return "text_completion"


@dataclass(frozen=True)
class ChatWire:
    """That of `/v1/chat/completions`."""

    tokenizer: Tokenizer
    id_prefix: str = "chatcmpl"

    def choice(self, index: int, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """A choice of a whole answer."""
        return chat.message_choice(index, chunks, self.tokenizer)

    def pieces(self, index: int, chunk: Chunk, is_first: bool) -> list[dict[str, Any]]:
        """Choices of one event each."""
        piece = chat.delta_choice(index, chunk, self.tokenizer)
        return [chat.delta_choice(index, None, self.tokenizer), piece] if is_first else [piece]

    def object_name(self, is_event: bool) -> str:
        """The field `object`."""
        return "chat.completion.chunk" if is_event else "chat.completion"


@dataclass(frozen=True)
class Exchange:
    """What all events of one answer share.

    Attributes:
        candidates: texts that are generated for a prompt.
        choices: how many of them are answered.
        echoes: what goes before the text of each request.
    """

    wire: Wire
    model: str
    prompt_tokens: int
    candidates: int
    choices: int
    sends_usage: bool
    echoes: Sequence[Chunk] = ()
    id: str = field(default_factory=new_id)
    created: int = field(default_factory=lambda: int(time.time()))

    async def collect(self, stream: AnyStream | None) -> Response:
        """The whole answer."""
        texts: dict[int, list[Chunk]] = {}
        async for index, chunk in self._chunks(stream):
            texts.setdefault(index, []).append(chunk)
        chosen = [
            texts[index] for prompt in range(0, len(texts), self.candidates) for index in self._best(texts, prompt)
        ]
        choices = [self.wire.choice(index, chunks) for index, chunks in enumerate(chosen)]
        body = self._body(choices, is_event=False)
        body["usage"] = self._usage({index: chunks[-1] for index, chunks in texts.items()})
        return Response(to_json(body), media_type="application/json")

    def stream(self, stream: AnyStream | None) -> Response:
        """The answer as server-sent events."""
        return _EventStream(stream, self._events(stream))

    async def _events(self, stream: AnyStream | None) -> AsyncIterator[bytes]:
        last: dict[int, Chunk] = {}
        try:
            async for index, chunk in self._chunks(stream):
                for piece in self.wire.pieces(index, chunk, is_first=index not in last):
                    yield _event(to_json(self._body([piece], is_event=True)))
                last[index] = chunk
        except RequestError as error:
            yield _event(to_json(error_body(error)))
            return
        if self.sends_usage:
            body = self._body([], is_event=True) | {"usage": self._usage(last)}
            yield _event(to_json(body))
        yield _event(b"[DONE]")

    async def _chunks(self, stream: AnyStream | None) -> AsyncIterator[tuple[int, Chunk]]:
        for index, echo in enumerate(self.echoes):
            yield index, echo
        if stream is not None:
            taken = current_usage()
            counts: dict[int, int] = {}
            async for index, chunk in stream:
                taken.completion_tokens += chunk.num_tokens - counts.get(index, 0)
                counts[index] = chunk.num_tokens
                yield index, _behind(self.echoes[index], chunk) if self.echoes else chunk

    def _best(self, texts: dict[int, list[Chunk]], prompt: int) -> list[int]:
        candidates = range(prompt, prompt + self.candidates)
        if self.choices == self.candidates:
            return list(candidates)

        def rank(index: int) -> float:
            generated = [chunk for chunk in texts[index] if chunk.num_tokens]
            return -score([lp.logprob for chunk in generated for lp in chunk.logprobs if lp.logprob is not None])

        return sorted(candidates, key=rank)[: self.choices]

    def _usage(self, last: dict[int, Chunk]) -> dict[str, Any]:
        # A prompt counts once, and what one text of it computed was not cached for the others.
        cached = sum(
            min(last[index].num_cached for index in range(prompt, prompt + self.candidates))
            for prompt in range(0, len(last), self.candidates)
        )
        return usage(self.prompt_tokens, sum(chunk.num_tokens for chunk in last.values()), cached)

    def _body(self, choices: list[dict[str, Any]], is_event: bool) -> dict[str, Any]:
        return {
            "id": f"{self.wire.id_prefix}-{self.id}",
            "object": self.wire.object_name(is_event),
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def _behind(echo: Chunk, chunk: Chunk) -> Chunk:
    """The chunk of a text that goes on after an echo."""
    moved = (replace(lp, text_offset=lp.text_offset + len(echo.text)) for lp in chunk.logprobs)
    return replace(chunk, logprobs=tuple(moved))


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class _EventStream(StreamingResponse):
    """Drops the requests of its stream however it ends, even if it never began.

    It begins with its first event: until then, a proxy can ask another replica if this one dies.
    """

    def __init__(self, stream: AnyStream | None, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        held: list[Message] = []

        async def send_from_first_event(message: Message) -> None:
            if message["type"] == "http.response.start":
                held.append(message)
                return
            while held:
                await send(held.pop())
            await send(message)

        async with self._stream or contextlib.nullcontext():
            await super().__call__(scope, receive, send_from_first_event)
