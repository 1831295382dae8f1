"""The experts that are in memory: a fixed number of slots for all layers, the least used given up first.

What counts is how often an expert was chosen, each time less the longer it was ago (LRFU, Lee et al. 2001). The
least recently used would not do: layers take turns, so that it is just the one whose turn is next.

An expert that a layer needs and that is not there is read before the layer goes on. Meanwhile, and while the
layer computes, those that the next one will likely need are read ahead.

Shapes: L MoE layers, E experts, T tokens, K experts a token.
"""

import mmap
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_ray.errors import ConfigError
from moe_ray.offload.expert_file import ExpertFile
from moe_ray.offload.predictor import Predictor
from moe_ray.offload.record import Record

# Reads at a time; more did not make the disk faster.
_READERS = 4
# What a choice counts for after each further step of its layer.
_DECAY = 0.98
# An expert is read ahead if it is as likely as this to be needed.
_LEAST_LIKELY = 0.5

Views = dict[str, Tensor]


@dataclass(frozen=True)
class OffloadStats:
    """Of experts that are read when they are needed; bytes held are now's, all else counts from the start.

    Attributes:
        expert_hits, expert_misses: experts that a step of a layer needed, by whether they were in memory or on
            their way.
        expert_prefetched, expert_prefetch_hits: experts that were read ahead, and those of them that were needed
            before they were given up.
        expert_bytes_read: from disk.
        expert_bytes_held: of the experts in memory.
        expert_wait_seconds: that steps waited for the disk.
    """

    expert_hits: int = 0
    expert_misses: int = 0
    expert_prefetched: int = 0
    expert_prefetch_hits: int = 0
    expert_bytes_read: int = 0
    expert_bytes_held: int = 0
    expert_wait_seconds: float = 0.0


@dataclass
class _Entry:
    """An expert in a slot: whether it was read by a guess that nothing has confirmed yet, and its reading."""

    slot: int
    is_guess: bool
    reading: Future[None]


def check_budget(record: Record, num_experts: int, budget_bytes: int) -> None:
    """Raise a ConfigError unless the budget holds the experts of a layer, all of which a step may need."""
    least = num_experts * record.num_bytes
    if budget_bytes < least:
        raise ConfigError(
            f"serve.expert_memory_bytes={budget_bytes} does not hold the {num_experts} experts of a layer.",
            f"give at least {least}, or quantize the experts.",
        )


class ResidentExperts:
    """Slots for the experts of a model. One thread calls all methods.

    Args:
        file: has the experts of all layers in order.
        budget_bytes: of all slots.
        prefetch: whether to read ahead.

    Raises:
        ConfigError: the budget does not hold the experts of a layer, all of which a step may need.
    """

    def __init__(
        self,
        file: ExpertFile,
        record: Record,
        num_layers: int,
        num_experts: int,
        budget_bytes: int,
        prefetch: bool,
    ) -> None:
        check_budget(record, num_experts, budget_bytes)
        self._file, self._record, self._num_experts = file, record, num_experts
        num_slots = min(budget_bytes // record.num_bytes, num_layers * num_experts)
        # Whole pages, which take memory only when they are first used.
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._memory = mmap.mmap(-1, num_slots * record.num_bytes, flags=private)
        slots = torch.frombuffer(self._memory, dtype=torch.uint8).view(num_slots, -1)
        self._views = [record.views(slot) for slot in slots]
        self._free = list(range(num_slots))
        # By (layer, expert).
        self._entries: dict[tuple[int, int], _Entry] = {}
        self._use_LE = np.zeros((num_layers, num_experts))
        self._is_there_LE = np.zeros((num_layers, num_experts), dtype=bool)
        # What the current step of a layer needs or waits for is not given up.
        self._is_kept_LE = np.zeros_like(self._is_there_LE)
        self._readers = ThreadPoolExecutor(_READERS, "experts")
        self._predictor = Predictor(num_layers, num_experts) if prefetch and num_layers > 1 else None
        self._last: tuple[int, np.ndarray] = (-1, np.empty((0, 0)))
        self._num_layers = num_layers
        self._guesses: list[tuple[int, int]] = []
        self._hits = self._misses = self._prefetched = self._prefetch_hits = self._read = 0
        self._wait_seconds = 0.0

    def acquire(self, layer: int, ids_TK: np.ndarray) -> Mapping[int, Views]:
        """The weights of all experts that tokens chose in a layer, by expert; good until the next call.

        Args:
            layer: counted among the MoE layers.
            ids_TK: the experts of each token; numbers from the number of experts on are none.

        Raises:
            CheckpointError: the file of the experts was damaged while it was used.
            StorageError: it cannot be read.
        """
        chosen = [int(expert) for expert in np.unique(ids_TK) if expert < self._num_experts]
        self._use_LE[layer] *= _DECAY
        self._use_LE[layer, chosen] += 1
        self._is_kept_LE[:] = False
        self._is_kept_LE[layer, chosen] = True
        self._drop_guesses()
        self._find(layer, chosen)
        self._wait(layer, chosen)
        if self._predictor is not None:
            self._read_ahead(self._predictor, layer, ids_TK)
        return {expert: self._views[self._entries[layer, expert].slot] for expert in chosen}

    def stats(self) -> OffloadStats:
        """Counts since the start and bytes now."""
        return OffloadStats(
            expert_hits=self._hits,
            expert_misses=self._misses,
            expert_prefetched=self._prefetched,
            expert_prefetch_hits=self._prefetch_hits,
            expert_bytes_read=self._read * self._record.num_bytes,
            expert_bytes_held=len(self._entries) * self._record.num_bytes,
            expert_wait_seconds=self._wait_seconds,
        )

    def _find(self, layer: int, chosen: list[int]) -> None:
        """Begin to read what is missing."""
        for expert in chosen:
            entry = self._entries.get((layer, expert))
            if entry is None:
                self._misses += 1
                self._place(layer, expert, is_guess=False)
            else:
                self._hits += 1
                self._prefetch_hits += entry.is_guess
                entry.is_guess = False

    def _wait(self, layer: int, chosen: list[int]) -> None:
        start = time.perf_counter()
        for expert in chosen:
            try:
                self._entries[layer, expert].reading.result()
            except Exception:
                self._remove(layer, expert)
                raise
        self._wait_seconds += time.perf_counter() - start

    def _read_ahead(self, predictor: Predictor, layer: int, ids_TK: np.ndarray) -> None:
        """Learn from what a layer chose, and begin to read what the next one will likely choose."""
        last_layer, last_TK = self._last
        if last_layer == layer - 1 and len(last_TK) == len(ids_TK):
            predictor.learn(last_layer, last_TK, ids_TK)
        self._last = layer, ids_TK.copy()
        following = layer + 1
        if following == self._num_layers:
            return
        likelihood_E = predictor.likelihood(layer, ids_TK)
        likely_E = likelihood_E >= _LEAST_LIKELY
        self._is_kept_LE[following] = likely_E & self._is_there_LE[following]
        room = len(self._views) - int(self._is_kept_LE.sum())
        missing = [
            int(e) for e in np.argsort(-likelihood_E) if likely_E[e] and not self._is_there_LE[following, e]
        ]
        for expert in missing[:room]:
            self._is_kept_LE[following, expert] = True
            self._place(following, expert, is_guess=True)
            self._guesses.append((following, expert))
            self._prefetched += 1

    def _drop_guesses(self) -> None:
        """Take back what is not needed and no reader has begun: they have better to do."""
        for key in self._guesses:
            if not self._is_kept_LE[key] and self._entries[key].reading.cancel():
                self._remove(*key)
                self._prefetched -= 1
                self._read -= 1
        self._guesses = []

    def _place(self, layer: int, expert: int, *, is_guess: bool) -> None:
        """Begin to read an expert, in the place of another if no slot is free."""
        if not self._free:
            use_LE = np.where(self._is_there_LE & ~self._is_kept_LE, self._use_LE, np.inf)
            self._remove(*divmod(int(use_LE.argmin()), self._num_experts))
        slot, size = self._free.pop(), self._record.num_bytes
        memory = memoryview(self._memory)[slot * size : (slot + 1) * size]
        reading = self._readers.submit(self._file.read, layer * self._num_experts + expert, memory)
        self._entries[layer, expert] = _Entry(slot, is_guess, reading)
        self._is_there_LE[layer, expert] = True
        self._read += 1

    def _remove(self, layer: int, expert: int) -> None:
        entry = self._entries.pop((layer, expert))
        # Nobody may write to the slot when it has another expert.
        if not entry.reading.cancel():
            wait([entry.reading])
        self._is_there_LE[layer, expert] = False
        self._free.append(entry.slot)
