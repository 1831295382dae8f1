"""Answer requests with a model and its engine."""

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

from starlette.responses import Response

from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.errors import DataError, RequestError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.answers import AnyStream, ChatWire, CompletionWire, Exchange
from moe_ray.serving.build_engine import build_response_cache, start_engine
from moe_ray.serving.chat_template import TEMPLATE_FILE, find_chat_template
from moe_ray.serving.engine import probe
from moe_ray.serving.engine.engine import check_faithful
from moe_ray.serving.engine.grammar import Grammar, GrammarCompiler
from moe_ray.serving.engine.request import Chunk, Request, SamplingParams, check_prompt
from moe_ray.serving.engine.stats import EngineStats
from moe_ray.serving.openai.base import parse
from moe_ray.serving.openai.chat import ChatRequest, parse_chat_request
from moe_ray.serving.openai.completions import (
    CompletionRequest,
    Prompt,
    parse_completion_request,
    parse_prompts,
)
from moe_ray.serving.openai.embeddings import (
    MAX_INPUTS,
    EmbeddingRequest,
    RoutingRequest,
    embedding_body,
    list_body,
    text_routing,
)
from moe_ray.serving.openai.models import Model
from moe_ray.serving.openai.sampling import SamplingFields
from moe_ray.serving.prompts import check_length, echo_chunk, encode_prompt, too_long
from moe_ray.serving.responses import json_response
from moe_ray.serving.usage import current_usage

# Tokens of all inputs of a request that looks at texts; as many as OpenAI takes.
_MAX_INPUT_TOKENS = 300_000
# Experts and weights in one answer, 20 MB of JSON.
_MAX_ROUTED_PAIRS = 1_000_000
# Of texts that are not streamed: what they took so far is counted as they come, should the client leave.
_WHOLE_PIECE_TOKENS = 32
_request_ids = itertools.count()


class CompletionService:
    """A loaded model with its running engine.

    Attributes:
        model_body: its entry in `/v1/models`.
        max_body_bytes: largest request body.
        max_body_seconds: longest time that one may take to come.
        max_http_requests: most requests at a time.
        step: optimizer steps behind the weights.
        architecture: settings of the model.
    """

    def __init__(self, model: InferenceModel, config: ServeConfig) -> None:
        check_faithful(model.config.model, config.allow_unfaithful_routing)
        self._name = model.name
        self._model = model.model
        self._tokenizer = model.tokenizer
        self._vocab_size = min(model.tokenizer.vocab_size, model.config.model.vocab_size)
        self._chat_template = find_chat_template(model.sidecars, model.tokenizer)
        self._max_context = config.max_context or model.config.model.max_sequence_length
        self._max_unfinished = config.max_unfinished
        self._compiling = ThreadPoolExecutor(1, "grammar")
        self.max_body_bytes = config.max_body_bytes
        self.max_body_seconds = config.max_body_seconds
        self.max_http_requests = config.max_http_requests
        self.step = model.step
        self.architecture = model.config.model
        self.model_body = Model(
            id=model.name,
            object="model",
            created=int(model.path.stat().st_mtime),
            owned_by="moe_ray",
            step=model.step,
            dtype=str(model.model.embed.weight.dtype).removeprefix("torch."),
            quantize=model.quantize if config.quantize == "none" else config.quantize,
            max_model_len=self._max_context,
        ).model_dump()
        self._engine = start_engine(model, config, self._max_context)
        self._responses = build_response_cache(self._engine, model, config)

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered; once false it stays so."""
        return self._engine.is_alive

    def stats(self) -> EngineStats:
        """What the engine has done and holds."""
        stats = self._engine.stats()
        return replace(stats, **vars(self._responses.stats())) if self._responses else stats

    def close(self) -> None:
        """Stop the engine."""
        self._engine.stop()
        if self._responses:
            self._responses.close()
        self._compiling.shutdown(cancel_futures=True)

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
        """Answer `POST /v1/completions`, given the decoded JSON body; all others alike.

        Raises:
            RequestError: it cannot be served (4xx), there is no room (503), or the engine failed (5xx).
        """
        request = parse_completion_request(body)
        self.check_model(request.model)
        candidates = max(request.n, request.best_of or 0)
        texts = parse_prompts(request.prompt)
        current_usage().prompt = request.prompt
        self._check_count(len(texts), candidates)
        prompts = [self._encode(text, "prompt") for text in texts]
        # The best are chosen by their log-probabilities.
        logprobs = 0 if request.logprobs is None and candidates > request.n else request.logprobs
        params = [request.params(i, max(request.max_tokens, 1), logprobs) for i in range(candidates)]
        engine_requests = self._requests(request, prompts, params)
        echoes = await self._echoes(request, prompts, candidates) if request.echo else ()
        exchange = Exchange(
            CompletionWire(self._tokenizer, request.logprobs is not None),
            request.model,
            sum(map(len, prompts)),
            candidates,
            request.n,
            request.sends_usage,
            echoes,
        )
        return await self._answer(request, exchange, engine_requests if request.max_tokens else [])

    async def chat(self, body: Mapping[str, Any]) -> Response:
        """Answer `POST /v1/chat/completions`."""
        request = parse_chat_request(body)
        self.check_model(request.model)
        current_usage().prompt = body["messages"]
        self._check_count(1, request.n)
        prompt = self._render(request)
        room = max(self._max_context - len(prompt), 1)
        grammar = None if request.json_schema is None else await self._compile(request.json_schema)
        max_tokens = request.token_limit or room
        params = [request.params(i, max_tokens, request.num_logprobs, grammar) for i in range(request.n)]
        exchange = Exchange(
            ChatWire(self._tokenizer), request.model, len(prompt), request.n, request.n, request.sends_usage
        )
        try:
            return await self._answer(request, exchange, self._requests(request, [prompt], params))
        except RequestError as error:
            # The engine knows no messages.
            error.param = "messages" if error.param == "prompt" else error.param
            raise

    async def embed(self, body: Mapping[str, Any]) -> Response:
        """Answer `POST /v1/embeddings`: the mean of the final hidden states, scaled to length 1."""
        request = parse(EmbeddingRequest, body)
        inputs = self._inputs(request)
        data = []
        for index, token_ids in enumerate(inputs):
            mean_D = await probe.mean_hidden(self._engine, self._model, token_ids)
            if not mean_D.isfinite().all():
                raise RequestError(
                    "the model gave numbers that are not finite.",
                    "serve another checkpoint, or serve.dtype=float32.",
                    status=500,
                )
            unit_D = mean_D / mean_D.norm().clamp(min=1e-12)
            data.append(embedding_body(index, unit_D.tolist(), request.encoding_format))
        return json_response(list_body(request.model, data, sum(map(len, inputs))))

    async def route(self, body: Mapping[str, Any]) -> Response:
        """Answer `POST /v1/routing`: which experts each token meets."""
        request = parse(RoutingRequest, body)
        inputs = self._inputs(request)
        config = self._model.config
        pairs = sum(map(len, inputs)) * len(config.moe_layers) * config.top_k
        if pairs > _MAX_ROUTED_PAIRS:
            raise RequestError(
                f"the input has {pairs} pairs of a token and an expert in all layers.",
                f"send texts with at most {_MAX_ROUTED_PAIRS} at a time.",
                param="input",
            )
        data = []
        for index, token_ids in enumerate(inputs):
            layers = await probe.routing(self._engine, self._model, token_ids)
            data.append(
                text_routing(index, token_ids, zip(config.moe_layers, layers, strict=True), self._tokenizer)
            )
        sizes = {"num_experts": config.num_experts, "top_k": config.top_k}
        return json_response(list_body(request.model, data, sum(map(len, inputs))) | sizes)

    async def _answer(self, request: SamplingFields, exchange: Exchange, requests: Sequence[Request]) -> Response:
        stream = await self._submit(requests) if requests else None
        current_usage().prompt_tokens = exchange.prompt_tokens
        if request.stream:
            return exchange.stream(stream)
        if stream is None:
            return await exchange.collect(None)
        async with stream:
            return await exchange.collect(stream)

    async def _submit(self, requests: Sequence[Request]) -> AnyStream:
        return await self._responses.submit(requests) if self._responses else self._engine.submit(requests)

    def _requests(
        self, request: SamplingFields, prompts: Sequence[tuple[int, ...]], params: Sequence[SamplingParams]
    ) -> list[Request]:
        deadline = None if request.timeout is None else time.monotonic() + request.timeout
        # A kept answer may be streamed later.
        piece_tokens = 1 if request.stream or self._responses else _WHOLE_PIECE_TOKENS
        return [
            Request(str(next(_request_ids)), prompt, param, request.priority, deadline, piece_tokens)
            for prompt in prompts
            for param in params
        ]

    def _check_count(self, num_prompts: int, num_choices: int) -> None:
        if num_prompts * num_choices > self._max_unfinished:
            raise RequestError(
                f"the request asks for {num_prompts} * {num_choices} texts.",
                f"ask for at most {self._max_unfinished} at a time.",
                param="prompt" if num_prompts > 1 else "n",
            )

    def _encode(self, prompt: Prompt, param: str) -> tuple[int, ...]:
        is_text = isinstance(prompt, str)
        return encode_prompt(self._tokenizer, prompt, self._max_context, param) if is_text else prompt

    def _render(self, request: ChatRequest) -> tuple[int, ...]:
        if self._chat_template is None:
            raise RequestError(
                f"the model {self._name!r} has no chat template.",
                f"use /v1/completions, or put a {TEMPLATE_FILE} into the model's folder.",
                param="messages",
            )
        messages = [message.for_template() for message in request.messages]
        text = "".join(message["content"] for message in messages)
        check_length(self._tokenizer, text, self._max_context, "messages")
        try:
            return tuple(self._chat_template.encode(messages, request.chat_template_kwargs))
        except DataError as error:
            raise RequestError(error.problem, error.fix, param="messages") from None

    def _inputs(self, request: EmbeddingRequest | RoutingRequest) -> list[tuple[int, ...]]:
        self.check_model(request.model)
        texts = parse_prompts(request.input, "input")
        current_usage().prompt = request.input
        if len(texts) > MAX_INPUTS:
            raise RequestError(f"the input has {len(texts)} texts.", f"send at most {MAX_INPUTS}.", param="input")
        inputs = []
        total = 0
        for text in texts:
            inputs.append(self._encode(text, "input"))
            self._check_input(inputs[-1], "input")
            total += len(inputs[-1])
            if total > _MAX_INPUT_TOKENS:
                raise RequestError(
                    "the input has too many tokens.", f"send at most {_MAX_INPUT_TOKENS} at a time.", param="input"
                )
        current_usage().prompt_tokens = total
        return inputs

    def _check_input(self, token_ids: Sequence[int], param: str) -> None:
        check_prompt(token_ids, self._vocab_size, param)
        if len(token_ids) > self._max_context:
            raise too_long(self._max_context, param)

    async def _echoes(
        self, request: CompletionRequest, prompts: Sequence[tuple[int, ...]], candidates: int
    ) -> list[Chunk]:
        """One for each request to the engine."""
        echoes = []
        for prompt in prompts:
            self._check_input(prompt, "prompt")
            found = None
            if request.logprobs is not None:
                found = await probe.prompt_logprobs(
                    self._engine, self._model, prompt, self._vocab_size, request.logprobs
                )
            echoes += [echo_chunk(self._tokenizer, prompt, found, request.max_tokens == 0)] * candidates
        return echoes

    async def _compile(self, schema: Mapping[str, Any]) -> Grammar:
        # Off the event loop, and one at a time: what compiles is one core's work at most.
        return await asyncio.get_running_loop().run_in_executor(self._compiling, self._compile_now, schema)

    def _compile_now(self, schema: Mapping[str, Any]) -> Grammar:
        return self._grammars.compile_schema(schema)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        return GrammarCompiler(self._tokenizer.serialized, self._vocab_size, self._tokenizer.stop_ids)
