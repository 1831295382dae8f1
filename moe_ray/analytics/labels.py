"""Labels of held-out tokens, and permutations of them that keep what neighbouring tokens have in common.

Tokens near each other are alike, and are routed alike. Labels that were permuted one by one would not be, so
that any router would seem to know them. What is permuted, therefore, is whole: the domains of documents; the
series of token classes, between sequences of a document and turned by a random number of places; and the series of
positions, turned. What a document or a domain has in common thus stays in the baseline of classes and positions.

Shapes: N sequences, S tokens of each, M labels, R permutations.
"""

from dataclasses import dataclass, replace

import numpy as np

from moe_ray.analytics.analysis import LabelKind
from moe_ray.analytics.held_out import HeldOut
from moe_ray.analytics.token_classes import CLASSES, classify
from moe_ray.data.tokenizer import Tokenizer

# More domains than this are counted as one.
MAX_DOMAINS = 16
_OTHER_DOMAINS = "other domains"
_DOCUMENTS = "domains of documents"
_SERIES = "class series between sequences of a document, turned by a random number of places"
_TURNED = "position series, turned by a random number of places in each sequence"


@dataclass(frozen=True, eq=False)
class Labels:
    """One label for each token, and R permutations.

    Attributes:
        names: M names.
        ids_NS: label of each token, int64.
        partner_RN: in a permutation, the sequence whose labels a sequence has, int64.
        shift_RN: by how many places they are turned, int64.
        units: how many were kept together.
        permuted: in words, what the permutations do.
    """

    kind: LabelKind
    names: tuple[str, ...]
    ids_NS: np.ndarray
    partner_RN: np.ndarray
    shift_RN: np.ndarray
    units: int
    permuted: str

    @property
    def permutations(self) -> int:
        """R."""
        return len(self.partner_RN)

    def first(self, permutations: int) -> "Labels":
        """The same with at most so many permutations."""
        return replace(self, partner_RN=self.partner_RN[:permutations], shift_RN=self.shift_RN[:permutations])

    def permuted_ids(self, permutations: slice, sequences: slice) -> np.ndarray:
        """Labels of some sequences in some permutations, int64 [R, N, S] of these."""
        length = self.ids_NS.shape[1]
        places = (self.shift_RN[permutations, sequences, None] + np.arange(length)) % length
        return self.ids_NS[self.partner_RN[permutations, sequences, None], places]


def domain_labels(text: HeldOut, permutations: int, seed: int) -> Labels:
    """Domains; those that are beyond the `MAX_DOMAINS` - 1 largest are one where there are too many."""
    names, domains_N = text.domains, text.domains_N
    if len(names) > MAX_DOMAINS:
        largest = np.sort(
            np.argsort(-np.bincount(domains_N, minlength=len(names)), kind="stable")[: MAX_DOMAINS - 1]
        )
        new = np.full(len(names), len(largest))
        new[largest] = np.arange(len(largest))
        names, domains_N = (*(names[i] for i in largest), _OTHER_DOMAINS), new[domains_N]
    generator = np.random.default_rng((seed, 0))
    _, first_U, unit_N = np.unique(text.units_N, return_index=True, return_inverse=True)
    order_RU = np.argsort(generator.random((permutations, len(first_U))), axis=1)
    partner_RN = first_U[order_RU][:, unit_N.reshape(-1)]
    ids_NS = np.repeat(domains_N[:, None], text.tokens_NS.shape[1], axis=1)
    return Labels("domain", names, ids_NS, partner_RN, np.zeros_like(partner_RN), len(first_U), _DOCUMENTS)


def class_labels(
    text: HeldOut, tokenizer: Tokenizer, counts_V: np.ndarray, permutations: int, seed: int
) -> Labels:
    """Classes of tokens, see `token_classes.classify`."""
    generator = np.random.default_rng((seed, 1))
    ids_NS = classify(text.tokens_NS, tokenizer, counts_V)
    num_sequences, length = ids_NS.shape
    # Sorted by unit and, within it, at random: the sequences of each unit change places with each other.
    keys_RN = text.units_N + generator.random((permutations, num_sequences))
    partner_RN = np.empty((permutations, num_sequences), np.int64)
    partner_RN[:, np.argsort(text.units_N, kind="stable")] = np.argsort(keys_RN, axis=1)
    shift_RN = generator.integers(length, size=partner_RN.shape)
    return Labels("token_class", CLASSES, ids_NS, partner_RN, shift_RN, len(np.unique(text.units_N)), _SERIES)


def position_labels(text: HeldOut, permutations: int, seed: int) -> Labels:
    """Position in the sequence, in buckets that double: 0, 1, 2-3, 4-7 and so on."""
    generator = np.random.default_rng((seed, 2))
    num_sequences, length = text.tokens_NS.shape
    buckets_S = np.array([position.bit_length() for position in range(length)], np.int64)
    names = []
    for bucket in range(int(buckets_S[-1]) + 1):
        first, last = 2**bucket // 2, min(length, 2**bucket) - 1
        names.append(str(first) if first == last else f"{first}-{last}")
    shape = (permutations, num_sequences)
    partner_RN = np.broadcast_to(np.arange(num_sequences), shape)
    shift_RN = generator.integers(length, size=shape)
    ids_NS = np.tile(buckets_S, (num_sequences, 1))
    return Labels("position", tuple(names), ids_NS, partner_RN, shift_RN, num_sequences, _TURNED)
