"""The held-out text that an analysis reads: sequences, their domains, and which of them belong together.

Shapes: N sequences, S tokens of each.
"""

from dataclasses import dataclass

import numpy as np

from moe_ray.data.batches import validation_batches
from moe_ray.data.reader import TokenData

# A domain with fewer documents is cut into this many parts, or its labels could hardly be permuted.
MIN_UNITS = 8


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Sequences spread evenly over the validation split, in its order.

    Attributes:
        tokens_NS: token ids, int64.
        domains: names.
        domains_N: domain id of each sequence, int64.
        units_N: number of the unit of each sequence, int64: the document in which it begins, or a part of it.
    """

    tokens_NS: np.ndarray
    domains: tuple[str, ...]
    domains_N: np.ndarray
    units_N: np.ndarray


def read_held_out(data: TokenData, max_tokens: int) -> HeldOut:
    """At most `max_tokens` tokens, but at least one sequence."""
    total = data.num_sequences("validation")
    (numbers_N,) = validation_batches(total, max(1, min(total, max_tokens // data.sequence_length)), 1)
    tokens_NS = np.stack([data.sequence("validation", int(n))[:-1] for n in numbers_N]).astype(np.int64)
    domains_N = data.domain_ids("validation", numbers_N)
    units_N = data.document_ids("validation", numbers_N)
    return HeldOut(tokens_NS, data.domains, domains_N, cut_units(domains_N, units_N))


def cut_units(domains_N: np.ndarray, units_N: np.ndarray) -> np.ndarray:
    """Units numbered from 0, those of domains that have fewer than `MIN_UNITS` replaced by even parts."""
    names = np.stack([domains_N, units_N], axis=1)
    for domain in np.unique(domains_N):
        places = np.flatnonzero(domains_N == domain)
        if len(np.unique(units_N[places])) < MIN_UNITS:
            names[places, 1] = np.arange(len(places)) * MIN_UNITS // len(places)
    return np.unique(names, axis=0, return_inverse=True)[1].reshape(-1)
