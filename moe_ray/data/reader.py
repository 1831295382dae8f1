"""A prepared folder, opened and read as sequences of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from moe_ray.data.shards import SPLITS, Index, Shard, check_files, read_index
from moe_ray.errors import DataError


@dataclass(frozen=True, eq=False)
class TokenData:
    """An opened folder, read as sequences. Open it again in another process: it holds memory maps.

    The sequences of a split are numbered domain by domain. Sequence i is a window of `sequence_length` + 1
    tokens; windows of one shard start `sequence_length` apart, so that each token but the first of a shard is
    predicted once. No window crosses shards or domains; what is left over at the end of a shard is not used.

    Attributes:
        folder: where it lies.
        index: what it holds.
        sequence_length: tokens of a sequence (S).
    """

    folder: Path
    index: Index
    sequence_length: int
    _shards: dict[str, list[Shard]]
    _tokens: dict[str, list[np.ndarray]]
    _stops: dict[str, np.ndarray]

    @property
    def domains(self) -> tuple[str, ...]:
        """Domain labels; a domain id is a position in them."""
        return self.index.domains

    def num_sequences(self, split: str, domain: str | None = None) -> int:
        """How many sequences a split has, or one domain of it."""
        if domain is None:
            return int(self._stops[split][-1])
        shards = [shard for shard in self._shards[split] if shard.domain == domain]
        return sum((shard.num_tokens - 1) // self.sequence_length for shard in shards)

    def sequence(self, split: str, number: int) -> np.ndarray:
        """Tokens [S + 1] of a sequence, as stored and read-only: inputs are [:-1], targets [1:].

        Raises:
            IndexError: there is no such sequence.
        """
        if not 0 <= number < self.num_sequences(split):
            raise IndexError(f"sequence {number} of {split} is not in [0, {self.num_sequences(split)})")
        shard = int(np.searchsorted(self._stops[split], number, side="right"))
        first = int(self._stops[split][shard - 1]) if shard else 0
        start = (number - first) * self.sequence_length
        return self._tokens[split][shard][start : start + self.sequence_length + 1]

    def domain_ids(self, split: str, numbers: np.ndarray) -> np.ndarray:
        """Domain id of each sequence, int64, of the shape of `numbers`."""
        by_shard = np.array([self.domains.index(shard.domain) for shard in self._shards[split]], np.int64)
        return by_shard[np.searchsorted(self._stops[split], numbers, side="right")]

    def document_ids(self, split: str, numbers: np.ndarray) -> np.ndarray:
        """Number in the split of the document that holds the first token of each sequence, int64."""
        ids = np.empty(numbers.shape, np.int64)
        of_sequence = np.searchsorted(self._stops[split], numbers, side="right")
        passed = 0
        for position, shard in enumerate(self._shards[split]):
            here = of_sequence == position
            first = int(self._stops[split][position - 1]) if position else 0
            offsets = np.load(self.folder / shard.offsets_file, mmap_mode="r", allow_pickle=False)
            starts = (numbers[here] - first) * self.sequence_length
            ids[here] = passed + np.searchsorted(offsets, starts, side="right") - 1
            passed += shard.num_documents
        return ids

    def documents(self, split: str, domain: str) -> Iterator[np.ndarray]:
        """Tokens of each document of a split and domain, its end-of-text id included."""
        for shard, tokens in zip(self._shards[split], self._tokens[split], strict=True):
            if shard.domain == domain:
                offsets = np.load(self.folder / shard.offsets_file, mmap_mode="r", allow_pickle=False)
                for start, stop in pairwise(offsets):
                    yield tokens[start:stop]

    def token_counts(self, split: str) -> np.ndarray:
        """How often each id occurs in a split, int64 [vocab_size]."""
        counts = np.zeros(self.index.vocab_size, np.int64)
        for tokens in self._tokens[split]:
            # bincount copies to int64: in pieces, or a full shard would take a gigabyte.
            for start in range(0, len(tokens), 1 << 22):
                counts += np.bincount(tokens[start : start + (1 << 22)], minlength=len(counts))
        return counts


def open_data(folder: str | Path, sequence_length: int, *, verify: bool = False) -> TokenData:
    """Open a prepared folder.

    Args:
        sequence_length: tokens of a sequence (S).
        verify: compare the checksum of every file too, not only its size.

    Raises:
        DataError: the folder is missing or damaged, or a split is too small for one sequence.
    """
    folder = Path(folder)
    index = read_index(folder)
    check_files(folder, index, verify=verify)
    shards = {split: [shard for shard in index.shards if shard.split == split] for split in SPLITS}
    for split in SPLITS:
        _check_length(index, split, shards[split], sequence_length)
    return TokenData(
        folder=folder,
        index=index,
        sequence_length=sequence_length,
        _shards=shards,
        _tokens={s: [np.memmap(folder / shard.file, index.dtype, "r") for shard in shards[s]] for s in SPLITS},
        _stops={s: np.cumsum([(shard.num_tokens - 1) // sequence_length for shard in shards[s]]) for s in SPLITS},
    )


def _check_length(index: Index, split: str, shards: list[Shard], sequence_length: int) -> None:
    longest = max((shard.num_tokens for shard in shards), default=0)
    if longest <= sequence_length:
        more = "" if split == "train" else " or raise data.validation_fraction"
        raise DataError(
            f"the {split} split has {index.totals(split).num_tokens} tokens, {longest} in its largest domain; one "
            f"sequence needs {sequence_length + 1} (data.sequence_length={sequence_length} and one to predict).",
            f"add text{more}, or lower data.sequence_length.",
        )
