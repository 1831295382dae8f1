"""Texts of a given form: JSON that fits a schema. The automaton is llguidance's.

A grammar is compiled once a request and then followed token by token: before each choice it names the tokens that
may come next, the end-of-text tokens among them once the text is complete.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from moe_ray.errors import RequestError

MAX_SCHEMA_CHARACTERS = 50_000
# A fifth of the default at the start, about 10 ms each; the rest as they are.
_LIMITS = LLParserLimits(initial_lexer_fuel=200_000, max_grammar_size=100_000, verbose_errors=False)
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar, at its beginning.

    Attributes:
        source: what it was compiled from.
    """

    _start: LLMatcher
    source: str

    def matcher(self) -> "Matcher":
        """Follows one text."""
        return Matcher(self._start.deep_copy())


class Matcher:
    """The state of one text."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> Tensor:
        """The tokens that may come next, bool of shape [V]; all once the grammar has failed: `accept` tells."""
        if self._matcher.is_error():
            return torch.ones(1, dtype=torch.bool)
        return torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8) > 0

    def accept(self, token_id: int) -> bool:
        """Go on by a token; returns False if the text cannot go on so, or the grammar has become too complex."""
        return self._matcher.consume_token(token_id)


class GrammarCompiler:
    """Compiles grammars for one vocabulary; safe to share between threads.

    Args:
        tokenizer_json: content of the tokenizer.json.
        vocab_size: V, tokens that can be chosen.
        stop_ids: the end-of-text tokens.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(stop_ids))

    def compile_schema(self, schema: Mapping[str, Any]) -> Grammar:
        """The grammar of JSON texts that fit a schema. It takes up to about 100 ms, mostly without Python's lock.

        Raises:
            RequestError: the schema is no schema, too large, or has keywords that cannot be enforced.
        """
        try:
            text = json.dumps(schema, allow_nan=False)
            if len(text) > MAX_SCHEMA_CHARACTERS:
                raise _refused(f"it has {len(text)} characters, more than {MAX_SCHEMA_CHARACTERS}")
            text.encode()
            # As json.dumps writes: a small model left free to choose white space may write nothing else.
            grammar = LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            )
        except (ValueError, RecursionError) as error:
            raise _refused(str(error)) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        if not matcher.is_error():
            # The first choices are where most of the work is that may turn out too much.
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(matcher.get_error())
        return Grammar(matcher, text)


def _refused(reason: str) -> RequestError:
    shown = " ".join(reason.split())[:_SHOWN_CHARACTERS].rstrip(".")
    return RequestError(f"the JSON schema cannot be followed: {shown}.", "simplify it.", param="response_format")
