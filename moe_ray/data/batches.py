"""Which sequences make a step, and a rank's share of them: pure functions of the step, whatever the world size."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from moe_ray.data.reader import TokenData

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class MicroBatch(NamedTuple):
    """One forward pass of one rank; B is 0 in those that only keep the ranks in step.

    Attributes:
        tokens_BS: inputs, int64.
        targets_BS: the token that follows each input, int64.
        domains_B: id of the domain of each sequence, int64.
    """

    tokens_BS: torch.Tensor
    targets_BS: torch.Tensor
    domains_B: torch.Tensor


def train_batch(num_sequences: int, step: int, global_batch: int, seed: int) -> np.ndarray:
    """Sequence numbers of a training step, int64 [G].

    The n-th sample of a run, n = step * G + position, is the (n mod W)-th of the n // W-th epoch; each epoch
    is a permutation of all W sequences. Nothing else enters, so a run may stop, resume and change its world
    size without a sequence lost or repeated.

    Args:
        num_sequences: sequences of the training split (W).
        step: from 0.
    """
    samples_G = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    epochs_G, positions_G = np.divmod(samples_G, num_sequences)
    return _permute(positions_G, epochs_G, num_sequences, seed)


def validation_batches(num_sequences: int, global_batch: int, num_batches: int) -> list[np.ndarray]:
    """Sequence numbers of an evaluation: int64, G each; the last has fewer where the split is small.

    They lie evenly over the split, so each domain has its share, and are the same every time.
    """
    count = min(num_sequences, global_batch * num_batches)
    numbers = np.arange(count, dtype=np.int64) * num_sequences // count
    return [numbers[start : start + global_batch] for start in range(0, count, global_batch)]


def micro_batches(
    data: TokenData, split: str, numbers_G: np.ndarray, rank: int, world: int, micro_batch: int
) -> Iterator[MicroBatch]:
    """The share of one rank of a global batch, in pieces of at most `micro_batch` sequences.

    Shares are contiguous and differ by one sequence at most; those of ranks 0, 1, … in order are the global
    batch. Every rank gets equally many pieces, empty ones at the end where it has fewer sequences, because
    the ranks that exchange tokens must run equally many forward passes.
    """
    share = np.array_split(numbers_G, world)[rank]
    largest_share = -(-len(numbers_G) // world)
    for start in range(0, largest_share, micro_batch):
        yield _load(data, split, share[start : start + micro_batch])


def unigram_perplexity(data: TokenData) -> float:
    """Perplexity of the validation split under the token frequencies of the training split, add-one smoothed.

    A model that beats it has learned more than which tokens are frequent.
    """
    train_V, validation_V = data.token_counts("train"), data.token_counts("validation")
    log_p_V = np.log((train_V + 1) / (train_V.sum() + len(train_V)))
    return float(np.exp(-(validation_V @ log_p_V) / validation_V.sum()))


def _load(data: TokenData, split: str, numbers_B: np.ndarray) -> MicroBatch:
    windows = np.empty((len(numbers_B), data.sequence_length + 1), np.int64)
    for row, number in enumerate(numbers_B):
        windows[row] = data.sequence(split, int(number))
    windows_BS = torch.from_numpy(windows)
    domains_B = torch.from_numpy(data.domain_ids(split, numbers_B))
    return MicroBatch(windows_BS[:, :-1].contiguous(), windows_BS[:, 1:].contiguous(), domains_B)


def _permute(positions_N: np.ndarray, epochs_N: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Image of each position under the permutation of [0, size) that belongs to the seed and its epoch.

    A Feistel network on the next even number of bits, walked until it lands inside: unlike a shuffled array
    it takes no memory, and unlike numpy's generators it is the same in every version.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys_N = _mix(_mix(np.full(len(epochs_N), seed & _MASK, np.uint64)) + epochs_N.astype(np.uint64))
    values_N = positions_N.astype(np.uint64)
    outside_N = np.ones(len(values_N), bool)
    while outside_N.any():
        left, right = values_N[outside_N] >> half, values_N[outside_N] & mask
        for number in range(_ROUNDS):
            salt = np.uint64((number + 1) * _GOLDEN & _MASK)
            left, right = right, left ^ (_mix(right ^ (keys_N[outside_N] + salt)) & mask)
        values_N[outside_N] = left << half | right
        outside_N = values_N >= size
    return values_N.astype(np.int64)


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64: a bijection of uint64 that spreads every bit over all."""
    values = values + np.uint64(_GOLDEN)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
