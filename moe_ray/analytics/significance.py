"""Information between experts and labels, and how likely chance is to make as much.

Shapes: L MoE layers, E experts, M labels, R permutations; "..." are any leading axes.
"""

import numpy as np

# Deviations of shares or bits below it are those of sums that were rounded to float32.
_ROUNDING = 1e-7


def information_bits(joint: np.ndarray) -> np.ndarray:
    """Mutual information of tables [..., E, M] that need not sum to 1, in bits [...]; 0 of empty ones."""
    joint = _to_shares(joint)
    rows, columns = joint.sum(axis=-1, keepdims=True), joint.sum(axis=-2, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log2(joint / (rows * columns)), 0.0)
    return np.maximum(terms.sum(axis=(-2, -1)), 0.0)


def entropy_bits(weights: np.ndarray) -> float:
    """Entropy of weights [M] that need not sum to 1."""
    shares = weights[weights > 0] / weights.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def excess(joint: np.ndarray) -> np.ndarray:
    """By how much each cell of tables [..., E, M] of shares exceeds independence."""
    joint = _to_shares(joint)
    return joint - joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)


def max_t(observed: np.ndarray, permuted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether any of many statistics is larger than chance makes it: single-step max-T (Westfall and Young 1993).

    Each is measured in standard deviations, and compared with the largest of all in each permutation: the chance
    that one of them is called significant at 5% although none is, is 5%, however many there are and however they
    depend on each other. For the p-value the deviations are those of the permutations and the observed
    statistic together: a maximum over thousands tells whether it was left out.

    Args:
        observed: of shape [...].
        permuted: of shape [R, ...].

    Returns:
        z over the permutations alone, and the corrected p-value, at least 1 / (R + 1), of the shape of `observed`.
    """
    mean, deviation = permuted.mean(axis=0), permuted.std(axis=0)
    everything = np.concatenate([observed[None].astype(permuted.dtype), permuted])
    scores = _standardized(everything, everything.mean(axis=0), everything.std(axis=0))
    largest_R = np.sort(scores[1:].reshape(len(permuted), -1).max(axis=1))
    beaten = np.searchsorted(largest_R, scores[0] - 1e-6, side="left")
    return _standardized(observed, mean, deviation), (1 + len(permuted) - beaten) / (1 + len(permuted))


def _standardized(values: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    return (values - mean) / np.where(deviation > _ROUNDING, deviation, np.inf)


def _to_shares(joint: np.ndarray) -> np.ndarray:
    total = joint.sum(axis=(-2, -1), keepdims=True)
    return joint / np.where(total > 0, total, 1)
