"""Answer completion requests with an engine."""

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.config import ServeConfig
from moe_ray.data.tokenizer import Tokenizer
from moe_ray.errors import DataError, RequestError
from moe_ray.serving import api
from moe_ray.serving.engine.cache import FREE_SHARE
from moe_ray.serving.engine.engine import Engine, check_faithful
from moe_ray.serving.engine.request import Chunk, Request
from moe_ray.serving.engine.thread import EngineThread, Stream
from moe_ray.serving.engine.tiers import Tiering

# Characters a token, to begin with, when looking whether a text can fit.
_CHARACTERS_PER_TOKEN = 8


class CompletionService:
    """A loaded model with its running engine.

    Attributes:
        model_body: its entry in `/v1/models`.
        max_body_bytes: largest request body.
    """

    def __init__(self, model: InferenceModel, config: ServeConfig) -> None:
        check_faithful(model.config.model, config.allow_unfaithful_routing)
        self._name = model.name
        self._tokenizer = model.tokenizer
        self._max_context = config.max_context or model.config.model.max_sequence_length
        self._max_unfinished = config.max_batch_size + config.max_queued_requests
        self.max_body_bytes = config.max_body_bytes
        self.model_body = api.model_body(model.name, int(model.path.stat().st_mtime))
        # As if all replicas were on one node. One that has a whole GPU shares its memory with nobody.
        sharers = 1 if config.gpus_per_replica >= 1 else config.max_replicas
        engine = Engine(
            model.model,
            model.tokenizer,
            max_batch_size=config.max_batch_size,
            max_context=self._max_context,
            kv_cache_bytes=config.kv_cache_bytes,
            free_share=FREE_SHARE / sharers,
            tiering=_tiering(config),
            identity=_identity(model.path),
        )
        self._engine = EngineThread(engine, self._max_unfinished)

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered; once false it stays so."""
        return self._engine.is_alive

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()

    def check_model(self, name: str) -> None:
        """Raise a RequestError (404) unless this model is served under the name."""
        if name != self._name:
            raise RequestError(
                f"the model {name[:100]!r} does not exist.",
                f"use {self._name!r}, or see /v1/models.",
                param="model",
                status=404,
                code="model_not_found",
            )

    async def complete(self, body: Mapping[str, Any]) -> Response:
        """Answer a decoded JSON body.

        Raises:
            RequestError: it cannot be served (4xx), there is no room (503), or the engine failed (5xx).
        """
        request = api.parse_completion_request(body)
        self.check_model(request.model)
        prompts = self._encode(api.parse_prompts(request.prompt), request.n)
        completion = _Completion(request, self._tokenizer, sum(map(len, prompts)))
        params = [request.sampling_params(choice) for choice in range(request.n)]
        engine_requests = [Request(uuid.uuid4().hex, prompt, p) for prompt in prompts for p in params]
        stream = self._engine.submit(engine_requests)
        if request.stream:
            return _EventStream(stream, completion)
        async with stream:
            return Response(await completion.collect(stream), media_type="application/json")

    def _encode(self, prompts: list[str | tuple[int, ...]], num_choices: int) -> list[tuple[int, ...]]:
        if len(prompts) * num_choices > self._max_unfinished:
            raise RequestError(
                f"the request asks for {len(prompts)} * {num_choices} texts.",
                f"ask for at most {self._max_unfinished} at a time.",
                param="prompt" if len(prompts) > 1 else "n",
            )
        return [
            encode_prompt(self._tokenizer, prompt, self._max_context) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]


def _tiering(config: ServeConfig) -> Tiering | None:
    if not config.prefix_memory_bytes and config.prefix_folder is None:
        return None
    folder = None if config.prefix_folder is None else Path(config.prefix_folder).expanduser().resolve()
    return Tiering(config.prefix_memory_bytes, folder, config.prefix_disk_bytes)


def _identity(folder: Path) -> str:
    """Changes whenever the files of a model do."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return repr([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files])


def encode_prompt(tokenizer: Tokenizer, text: str, max_context: int) -> tuple[int, ...]:
    """Token ids of a prompt. An empty text becomes the end-of-text token, which precedes every document.

    Encoding occupies the process, so of a text that is far too long only the beginning is encoded.

    Raises:
        RequestError: the text is no Unicode, or surely longer than `max_context`.
    """
    try:
        size = _CHARACTERS_PER_TOKEN * max_context
        while size < len(text):
            # Twice: where a text is cut, a few tokens may come out that the whole text does not have.
            if len(tokenizer.encode(text[:size])) > 2 * max_context:
                raise RequestError(
                    f"the prompt has more than the {max_context} tokens of the context.",
                    "shorten the prompt.",
                    param="prompt",
                    code="context_length_exceeded",
                )
            size *= 2
        return tuple(tokenizer.encode(text)) or (tokenizer.eos_id,)
    except DataError as error:
        raise RequestError(error.problem, error.fix, param="prompt") from None


@dataclass(frozen=True)
class _Completion:
    """What all events of one answer share."""

    request: api.CompletionRequest
    tokenizer: Tokenizer
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def collect(self, stream: Stream) -> bytes:
        """The whole answer as JSON."""
        chunks: dict[int, list[Chunk]] = {}
        async for index, chunk in stream:
            chunks.setdefault(index, []).append(chunk)
        choices = [api.choice_body(index, chunks[index], self.tokenizer) for index in sorted(chunks)]
        return self._to_json(choices, self._usage({index: c[-1].num_tokens for index, c in chunks.items()}))

    async def events(self, stream: Stream) -> AsyncIterator[bytes]:
        """The answer as server-sent events; a failure on the way is an event with the error body."""
        num_tokens: dict[int, int] = {}
        try:
            async for index, chunk in stream:
                num_tokens[index] = chunk.num_tokens
                yield _event(self._to_json([api.choice_body(index, [chunk], self.tokenizer)]))
        except RequestError as error:
            yield _event(api.to_json(api.error_body(error)))
            return
        if self.request.stream_options is not None and self.request.stream_options.include_usage:
            yield _event(self._to_json([], self._usage(num_tokens)))
        yield _event(b"[DONE]")

    def _usage(self, num_tokens: dict[int, int]) -> dict[str, int]:
        return api.usage_body(self.prompt_tokens, sum(num_tokens.values()))

    def _to_json(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        body = api.completion_body(self.id, self.created, self.request.model, choices, usage)
        return api.to_json(body)


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


class _EventStream(StreamingResponse):
    """Drops the requests of its stream however it ends, even if it never began."""

    def __init__(self, stream: Stream, completion: _Completion) -> None:
        super().__init__(completion.events(stream), media_type="text/event-stream")
        self.headers["cache-control"] = "no-cache"
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._stream:
            await super().__call__(scope, receive, send)
