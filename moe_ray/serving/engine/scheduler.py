"""Which tokens go into the next forward pass: continuous batching as pure logic.

Every step takes one token of each decoding sequence and up to `prefill_tokens` prompt tokens, first come,
first served, so that a long prompt never holds up running texts for long. Sequences in the batch occupy the
slots 0 to n - 1. Those that decode come first and at most one, the last, has a prompt that is cached in part:
decode attention can thus read the first slots of the cache as they lie.
"""

from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class Sequence:
    """Tokens of one request as the scheduler sees them.

    Attributes:
        tokens: the prompt, then what was generated.
        cached: leading tokens whose keys and values are in the cache.
    """

    id: str
    tokens: list[int]
    cached: int = 0


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `start + count` of the sequence in `slot`, not yet cached."""

    slot: int
    start: int
    count: int

    @property
    def end(self) -> int:
        """Tokens of the sequence that are cached once the span is computed."""
        return self.start + self.count


@dataclass(frozen=True)
class Move:
    """The sequence in slot `source`, of which `length` tokens are cached, goes to slot `target`."""

    source: int
    target: int
    length: int


class Scheduler:
    """Waiting and active sequences.

    Args:
        max_active: slots.
        prefill_tokens: most prompt tokens of one step.

    Attributes:
        active: sequences by slot.
    """

    def __init__(self, max_active: int, prefill_tokens: int) -> None:
        self._max_active = max_active
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.active or self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence with at least one uncached token."""
        self._waiting.append(sequence)

    def plan(self) -> list[Span]:
        """Spans of the next forward pass by slot, after giving free slots to waiting sequences.

        The caller runs them and then calls `advance`.
        """
        spans = []
        budget = self._prefill_tokens
        for slot, sequence in enumerate(self.active):
            span = _next_span(slot, sequence, budget)
            budget -= span.count if span.count > 1 else 0
            spans.append(span)
        while self._waiting and len(self.active) < self._max_active and budget > 0:
            sequence = self._waiting.popleft()
            span = _next_span(len(self.active), sequence, budget)
            budget -= span.count
            self.active.append(sequence)
            spans.append(span)
        return spans

    def advance(self, spans: list[Span]) -> list[int]:
        """Record that the spans are cached; returns the slots that now need a next token."""
        for span in spans:
            self.active[span.slot].cached = span.end
        return [span.slot for span in spans if span.end == len(self.active[span.slot].tokens)]

    def remove(self, sequence: Sequence) -> list[Move]:
        """Forget a sequence; the cache must carry out the moves, in order, to keep the slots dense."""
        if sequence not in self.active:
            self._waiting.remove(sequence)
            return []
        last = len(self.active) - 1
        partial = len(self.active[last].tokens) - self.active[last].cached > 1
        hole = self.active.index(sequence)
        moves = []
        # The last decoding sequence fills the hole and a partial prompt behind it closes up.
        for source in (last - 1, last) if partial else (last,):
            if source > hole:
                self.active[hole] = self.active[source]
                moves.append(Move(source, hole, self.active[source].cached))
                hole = source
        self.active.pop()
        return moves


def _next_span(slot: int, sequence: Sequence, budget: int) -> Span:
    pending = len(sequence.tokens) - sequence.cached
    return Span(slot, sequence.cached, min(pending, max(budget, 1)))
