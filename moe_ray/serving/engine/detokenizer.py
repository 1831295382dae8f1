"""Text from tokens as they come."""

from collections.abc import Sequence

from moe_ray.serving.engine.request import Tokenizer

_REPLACEMENT = "\ufffd"
# Tokens decoded again with each new one at most. A character is cut over at most 4 tokens, so only a long run
# of bytes that are not text gets here; one character of it may then come out differently.
_MAX_PENDING = 64
_CONTEXT_TOKENS = 4


class Detokenizer:
    """Turns a growing list of tokens into text that never has to be taken back.

    Tokens may hold parts of a UTF-8 character, which `decode` shows as U+FFFD at the end: that last character
    is held back until the next token tells whether it is one.

    Args:
        prompt_ids: what precedes the text; some tokenizers decode the first token of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._set_context(list(prompt_ids[-_CONTEXT_TOKENS:]))
        if self._context_text.endswith(_REPLACEMENT):
            self._set_context([])

    def push(self, token_id: int) -> str:
        """The characters that became certain with this token, often none or several."""
        self._pending.append(token_id)
        text = self._pending_text()
        certain = text.removesuffix(_REPLACEMENT) if len(self._pending) < _MAX_PENDING else text
        new = certain[self._emitted :]
        self._emitted = max(self._emitted, len(certain))
        if self._emitted == len(text):
            self._set_context(self._pending)
        return new

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        return self._pending_text()[self._emitted :]

    def _pending_text(self) -> str:
        return self._tokenizer.decode(self._context + self._pending)[len(self._context_text) :]

    def _set_context(self, context: list[int]) -> None:
        self._context = context
        self._context_text = self._tokenizer.decode(context)
        self._pending: list[int] = []
        self._emitted = 0


class StopFilter:
    """Ends a text at the first stop string, however it is cut into pieces.

    Attributes:
        stopped: a stop string was found; nothing follows.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        self._held += text
        found = [start for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.flush()
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def flush(self) -> str:
        """What is held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
