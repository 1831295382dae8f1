"""Which tokens go into the next forward pass: continuous batching as pure logic.

Every step takes one token of each text that goes on and up to `prefill_tokens` tokens of prompts, so that a long
prompt never holds up texts for long; if none goes on, several times as many. Sequences are ranked: a higher
priority first, then whoever came first. In that order they get their prompts computed, and in reverse they give
way:

- When a text grows and no block is free, the lowest of those that run is preempted, which may be itself.
- A waiting one preempts only those of lower priority, and only if that makes it fit.
- The first that waits is never passed by one behind it. So within a priority nothing starves; lower priorities do
  while higher ones keep the engine full.

A preempted sequence keeps its tokens and its place in the ranking; on return its keys and values are computed
again, as far as its blocks have not stayed known.

Shapes: R rows, one for each sequence that may run; M blocks that a sequence may have.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moe_ray.serving.engine.blocks import BlockPool, chain_digest

# How many times as many prompt tokens a step takes if no text goes on: weights are read once for all of them.
_ALONE = 4


@dataclass(eq=False)
class Sequence:
    """Tokens of one request as the scheduler sees them.

    Attributes:
        tokens: the prompt, then what was generated.
        priority: higher goes first.
        cached: leading tokens whose keys and values are in the cache.
        blocks: where they are, with room for all tokens; empty while it waits.
        row: of the tables; -1 while it waits.
        rank: lower goes first; the scheduler sets it.
        digests: of its leading full blocks, as far as they were needed.
        found: leading tokens that were known when it first ran; -1: it has not yet.
        loaded: blocks that a tier below the cache had of its prefix, by digest.
    """

    id: str
    tokens: list[int]
    priority: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    row: int = -1
    rank: tuple[int, int] = (0, 0)
    digests: list[bytes] = field(default_factory=list)
    found: int = -1
    loaded: dict[bytes, np.ndarray] = field(default_factory=dict)

    @property
    def num_pending(self) -> int:
        """Tokens that are not cached."""
        return len(self.tokens) - self.cached


class Span(NamedTuple):
    """Tokens `start` to `start + count` of a sequence, not yet cached."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        """Tokens of the sequence that are cached once the span is computed."""
        return self.start + self.count


class Scheduler:
    """Waiting and running sequences.

    Args:
        pool: the blocks; those of any one sequence fit.
        block_tokens: tokens of a block.
        max_running: most sequences in one pass.
        max_blocks: most blocks of a sequence.
        prefill_tokens: most prompt tokens of one step in which texts go on; four times as many if none does.
        root: digest of no tokens.

    Attributes:
        running: by rank.
        tables_RM: int32, blocks of the running sequences by their rows.
        restored: blocks and what must be written to them before the planned pass; the caller empties the list.
        preemptions: so far.
        prefix_tokens, prefix_hit_tokens: of the prompts that ran so far, all and those that were found.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_tokens: int,
        max_running: int,
        max_blocks: int,
        prefill_tokens: int,
        root: bytes = b"",
    ) -> None:
        self._pool = pool
        self._block_tokens = block_tokens
        self._prefill_tokens = prefill_tokens
        self._root = root
        self._arrivals = 0
        self._waiting: list[Sequence] = []
        self._free_rows = list(range(max_running - 1, -1, -1))
        # Digests of full blocks that running sequences are about to compute.
        self._computing: set[bytes] = set()
        self.running: list[Sequence] = []
        self.tables_RM = np.zeros((max_running, max_blocks), dtype=np.int32)
        self.restored: list[tuple[int, np.ndarray]] = []
        self.preemptions = 0
        self.prefix_tokens = 0
        self.prefix_hit_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.running or self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run."""
        return len(self._waiting)

    @property
    def queued_tokens(self) -> int:
        """Tokens that are still to be computed, of prompts nearly all."""
        return sum(sequence.num_pending for queue in (self.running, self._waiting) for sequence in queue)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence with at least one uncached token."""
        sequence.rank = (-sequence.priority, self._arrivals)
        self._arrivals += 1
        insort(self._waiting, sequence, key=_rank)

    def unknown_prefix(self, sequence: Sequence) -> list[bytes]:
        """Digests of the blocks that the sequence could use if they were known."""
        usable = self._usable_digests(sequence)
        return usable[len(self._pool.find(usable)) :]

    def plan(self) -> list[Span]:
        """Spans of the next forward pass, those of one token first; the caller runs them, then calls `advance`."""
        self._grow()
        self._admit()
        single, longer, budget = [], [], self._budget()
        for sequence in self.running:
            pending = len(sequence.tokens) - sequence.cached
            if pending == 1:
                single.append(Span(sequence, sequence.cached, 1))
            elif budget:
                count = min(pending, budget)
                budget -= count
                (single if count == 1 else longer).append(Span(sequence, sequence.cached, count))
        return single + longer

    def advance(self, spans: list[Span]) -> list[int]:
        """Record that the spans are cached; returns the indices of those whose sequence needs a next token."""
        ended = []
        for index, (sequence, start, count) in enumerate(spans):
            end = sequence.cached = start + count
            if end // self._block_tokens > start // self._block_tokens:
                self._publish(sequence, start // self._block_tokens, end // self._block_tokens)
            if end == len(sequence.tokens):
                ended.append(index)
        return ended

    def remove(self, sequence: Sequence, *, is_broken: bool = False) -> None:
        """Forget a sequence, whose blocks are free at once.

        Args:
            is_broken: what it computed is not to be shared.
        """
        if sequence.row < 0:
            del self._waiting[bisect_left(self._waiting, sequence.rank, key=_rank)]
            return
        if is_broken:
            self._pool.forget(sequence.blocks)
        self._stop(sequence)

    def _grow(self) -> None:
        """Give each running sequence a block for its newest token."""
        for sequence in self.running.copy():
            if sequence.row < 0 or len(sequence.tokens) <= len(sequence.blocks) * self._block_tokens:
                continue
            while not self._pool.num_free and sequence.row >= 0:
                self._preempt()
            if sequence.row >= 0:
                self.tables_RM[sequence.row, len(sequence.blocks)] = block = self._pool.allocate(1)[0]
                sequence.blocks.append(block)

    def _admit(self) -> None:
        prompts = [sequence for sequence in self.running if sequence.num_pending > 1]
        while self._waiting:
            sequence = self._waiting[0]
            # Of those that still run: some may be preempted meanwhile.
            outranking = (s.num_pending for s in prompts if s.rank < sequence.rank and s.row >= 0)
            if sum(outranking) >= self._budget():
                return
            usable = self._usable_digests(sequence)
            found = self._pool.find(usable)
            # What another one is about to compute is waited for, not computed twice.
            if len(found) < len(usable) and usable[len(found)] in self._computing:
                return
            if not self._make_room(sequence, found):
                return
            self._start(self._waiting.pop(0), found)
            if sequence.num_pending > 1:
                prompts.append(sequence)

    def _budget(self) -> int:
        """Most prompt tokens of the next step: more if no text has to pause for them."""
        pauses = any(sequence.num_pending == 1 for sequence in self.running)
        return self._prefill_tokens * (1 if pauses else _ALONE)

    def _make_room(self, sequence: Sequence, found: list[int]) -> bool:
        """Whether a waiting sequence fits, after preempting others of lower priority if that makes it."""
        while True:
            # Each running sequence can take one more block before anything has to be preempted.
            wanted = self._num_blocks(sequence) - len(found) + self._pool.count_free(found) + len(self.running)
            if self._free_rows and wanted <= self._pool.num_free:
                return True
            lower = self.running[bisect_left(self.running, 1 - sequence.priority, key=_negative_priority) :]
            if not lower or wanted > self._pool.num_free + sum(len(s.blocks) + 1 for s in lower):
                return False
            self._preempt()

    def _start(self, sequence: Sequence, found: list[int]) -> None:
        self._pool.share(found)
        sequence.blocks = found + self._pool.allocate(self._num_blocks(sequence) - len(found))
        sequence.cached = len(found) * self._block_tokens
        sequence.row = self._free_rows.pop()
        self.tables_RM[sequence.row, : len(sequence.blocks)] = sequence.blocks
        self._restore(sequence)
        self._computing.update(sequence.digests[sequence.cached // self._block_tokens :])
        insort(self.running, sequence, key=_rank)
        if sequence.found < 0:
            sequence.found = sequence.cached
            self.prefix_tokens += len(sequence.tokens)
            self.prefix_hit_tokens += sequence.found

    def _restore(self, sequence: Sequence) -> None:
        """Take what was loaded after the blocks that were found."""
        for index in range(sequence.cached // self._block_tokens, len(self._usable_digests(sequence))):
            data = sequence.loaded.get(sequence.digests[index])
            if data is None:
                break
            self.restored.append((sequence.blocks[index], data))
            self._pool.publish(sequence.blocks[index], sequence.digests[index])
            sequence.cached += self._block_tokens
        sequence.loaded = {}

    def _stop(self, sequence: Sequence) -> None:
        del self.running[bisect_left(self.running, sequence.rank, key=_rank)]
        self._computing.difference_update(sequence.digests[sequence.cached // self._block_tokens :])
        self._pool.release(sequence.blocks)
        self._free_rows.append(sequence.row)
        sequence.blocks, sequence.cached, sequence.row = [], 0, -1

    def _preempt(self) -> None:
        sequence = self.running[-1]
        self._stop(sequence)
        insort(self._waiting, sequence, key=_rank)
        self.preemptions += 1

    def _publish(self, sequence: Sequence, first: int, end: int) -> None:
        self._extend_digests(sequence, end)
        for index in range(first, end):
            self._pool.publish(sequence.blocks[index], sequence.digests[index])
            self._computing.discard(sequence.digests[index])

    def _usable_digests(self, sequence: Sequence) -> list[bytes]:
        """Those that it could share: at least one token is computed, for the logits of the next."""
        self._extend_digests(sequence, len(sequence.tokens) // self._block_tokens)
        return sequence.digests[: (len(sequence.tokens) - 1) // self._block_tokens]

    def _extend_digests(self, sequence: Sequence, count: int) -> None:
        digests, size = sequence.digests, self._block_tokens
        for index in range(len(digests), count):
            parent = digests[-1] if digests else self._root
            digests.append(chain_digest(parent, sequence.tokens[index * size : (index + 1) * size]))

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self._block_tokens)


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _negative_priority(sequence: Sequence) -> int:
    return -sequence.priority
