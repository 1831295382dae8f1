"""What is asked of the engine and what it answers, validated once at the door."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moe_ray.errors import RequestError
from moe_ray.serving.engine.grammar import Grammar

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 1000
MAX_LOGPROBS = 20
MAX_BIASES = 1024

FinishReason = Literal["stop", "length", "error", "grammar", "deadline"]


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """The token that precedes every document and ends it."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text, `eos_id` among them."""
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
        min_p: keep tokens at least this fraction as likely as the most likely one, before `top_k`.
        presence_penalty, frequency_penalty: taken from the logit of a token that was generated, once and for
            each time.
        repetition_penalty: divides positive and multiplies negative logits of tokens that the prompt or the text
            has (Keskar et al. 2019).
        logit_bias: (token id, number that its logit gets more) pairs.
        grammar: what the text must be.
        ignore_eos: go on after an end-of-text token.
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
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None
    ignore_eos: bool = False
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "an integer of at least 1")
        _require_between("temperature", self.temperature, 0, 2)
        _require_between("min_p", self.min_p, 0, 1)
        _require_between("presence_penalty", self.presence_penalty, -2, 2)
        _require_between("frequency_penalty", self.frequency_penalty, -2, 2)
        _require_between("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _require(
            len(self.logit_bias) <= MAX_BIASES,
            "logit_bias",
            f"{len(self.logit_bias)} tokens",
            f"at most {MAX_BIASES}",
        )
        for _, bias in self.logit_bias:
            _require_between("logit_bias", bias, -100, 100)
        _require(
            self.grammar is None or not self.ignore_eos, "ignore_eos", True, "false with a text of a given form"
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
        piece_tokens: tokens that a piece of its text gathers, but for the last; what nobody reads before its end
            costs less in few pieces.
    """

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    deadline: float | None = None
    piece_tokens: int = 1

    def check(self, vocab_size: int, max_context: int) -> None:
        """Whether a model can serve it.

        Raises:
            RequestError: the prompt is empty, holds an unknown token or leaves no room for `max_tokens`.
        """
        check_prompt(self.prompt_ids, vocab_size)
        for token, _ in self.params.logit_bias:
            _require(0 <= token < vocab_size, "logit_bias", token, f"token ids from 0 to {vocab_size - 1}")
        total = len(self.prompt_ids) + self.params.max_tokens
        if total > max_context:
            raise RequestError(
                f"the prompt has {len(self.prompt_ids)} tokens and max_tokens={_short(self.params.max_tokens)}, "
                f"together more than the context of {max_context} tokens.",
                "shorten the prompt or lower max_tokens.",
                param="prompt" if len(self.prompt_ids) >= max_context else "max_tokens",
                code="context_length_exceeded",
            )


def check_prompt(token_ids: Sequence[int], vocab_size: int, param: str = "prompt") -> None:
    """Raise a RequestError if there are no tokens, or some that the model does not know."""
    if not token_ids:
        raise RequestError(f"the {param} has no tokens.", "give at least one token.", param=param)
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        bad = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise RequestError(
            f"the {param} holds token {_short(bad)}.", f"use token ids from 0 to {vocab_size - 1}.", param=param
        )


@dataclass(frozen=True)
class TokenLogprob:
    """A token with natural-log probabilities of the raw logits, before temperature, penalties and filters.

    Attributes:
        logprob: None for the first token of a prompt, which nothing precedes.
        text_offset: characters of the generated text before this token.
        top: the most likely (token id, logprob) pairs, best first.
    """

    token_id: int
    text_offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Chunk:
    """The next piece of a request's text.

    Attributes:
        request_id: whose text it is.
        text: complete characters, which contain no part of a stop string.
        logprobs: the tokens of `text`, if the request asked for them.
        finish_reason: set in the last chunk only: an end-of-text token or stop string, `max_tokens` reached,
            the model failed, the grammar became too complex to follow, or the deadline passed.
        num_tokens: tokens generated so far, an end-of-text token included.
        num_cached: tokens of the prompt that were known before.
    """

    request_id: str
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    num_tokens: int
    num_cached: int = 0


def _require(holds: bool, param: str, value: object, allowed: str) -> None:
    if not holds:
        raise RequestError(f"{param}={_short(value)} is not allowed.", f"use {allowed}.", param=param)


def _require_between(param: str, value: float, least: float, most: float) -> None:
    holds = math.isfinite(value) and least <= value <= most
    _require(holds, param, value, f"a number from {least} to {most}")


def _short(value: object) -> str:
    # str() refuses integers of more than 4300 digits, and nobody wants to read one of 40.
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
