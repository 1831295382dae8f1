"""What is asked of the engine and what it answers, validated once at the door."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moe_ray.errors import RequestError

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1000
MAX_LOGPROBS = 5

FinishReason = Literal["stop", "length", "error", "deadline"]


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids are 0 to vocab_size - 1."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the most likely token; else logits are divided by it.
        top_p: keep the fewest most likely tokens whose probabilities reach it.
        top_k: keep this many most likely tokens, before `top_p`; 0 keeps all.
        seed: the same seed draws the same tokens whatever else is in the batch; None draws anew each time.
        stop: strings that end the text; they are not part of it.
        logprobs: report the log-probability of each token and of this many most likely ones.

    Raises:
        RequestError: a value is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer of at least 1")
        _require(
            math.isfinite(self.temperature) and 0 <= self.temperature <= 2,
            "temperature",
            self.temperature,
            "a number from 0 to 2",
        )
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0 and up to 1")
        _require(self.top_k >= 0, "top_k", self.top_k, "an integer of at least 0")
        _require(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit signed integer")
        _require(
            self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS,
            "logprobs",
            self.logprobs,
            f"null or an integer from 0 to {MAX_LOGPROBS}",
        )
        _require(len(self.stop) <= MAX_STOPS, "stop", f"{len(self.stop)} strings", f"at most {MAX_STOPS}")
        for text in self.stop:
            _require(
                0 < len(text) <= MAX_STOP_CHARACTERS,
                "stop",
                f"a string of {len(text)} characters",
                f"strings of 1 to {MAX_STOP_CHARACTERS} characters",
            )


@dataclass(frozen=True)
class Request:
    """One text to continue.

    Attributes:
        id: unique among the requests in the engine.
        prompt_ids: at least one token.
        priority: requests of a higher one go first and may interrupt those of lower ones.
        deadline: when it ends unfinished, in seconds of the monotonic clock; None: never.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    deadline: float | None = None

    def check(self, vocab_size: int, max_context: int) -> None:
        """Whether a model can serve it.

        Raises:
            RequestError: the prompt is empty, holds an unknown token or leaves no room for `max_tokens`.
        """
        if not self.prompt_ids:
            raise RequestError("the prompt has no tokens.", "give at least one token.", param="prompt")
        if min(self.prompt_ids) < 0 or max(self.prompt_ids) >= vocab_size:
            bad = next(token for token in self.prompt_ids if not 0 <= token < vocab_size)
            raise RequestError(
                f"the prompt holds token {_short(bad)}.",
                f"use token ids from 0 to {vocab_size - 1}.",
                param="prompt",
            )
        total = len(self.prompt_ids) + self.params.max_tokens
        if total > max_context:
            raise RequestError(
                f"the prompt has {len(self.prompt_ids)} tokens and max_tokens={_short(self.params.max_tokens)}, "
                f"together more than the context of {max_context} tokens.",
                "shorten the prompt or lower max_tokens.",
                param="prompt" if len(self.prompt_ids) >= max_context else "max_tokens",
                code="context_length_exceeded",
            )


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token with natural-log probabilities of the raw logits, before temperature and filters.

    Attributes:
        text_offset: characters of the generated text before this token.
        top: the most likely (token id, logprob) pairs, best first.
    """

    token_id: int
    text_offset: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
    """The next piece of a request's text.

    Attributes:
        request_id: whose text it is.
        text: complete characters, which contain no part of a stop string.
        logprobs: the tokens of `text`, if the request asked for them.
        finish_reason: set in the last chunk only: an end-of-text token or stop string, `max_tokens` reached,
            the model failed, or the deadline passed.
        num_tokens: tokens generated so far, an end-of-text token included.
    """

    request_id: str
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    num_tokens: int


def _require(holds: bool, param: str, value: object, allowed: str) -> None:
    if not holds:
        raise RequestError(f"{param}={_short(value)} is not allowed.", f"use {allowed}.", param=param)


def _short(value: object) -> str:
    # str() refuses integers of more than 4300 digits, and nobody wants to read one of 40.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
