"""What a pass over held-out text adds up. Memory does not grow with the text, except for what tells drift.

Shapes: B sequences, S tokens of each, T tokens (B*S), L MoE layers, E experts, K choices of a token, M labels,
R permutations, C tokens that are counted by id, W bytes that hold E bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ray.analytics.labels import Labels
from moe_ray.models.router import Routing

# Most numbers in a table: of permuted labels of one kind, of pairs of experts, of tokens by expert.
MAX_CELLS = 1 << 24
# Numbers in one piece of permuted labels.
_PIECE = 1 << 22
MAX_DRIFT_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """What one layer did with T tokens.

    Attributes:
        chosen_TE: 1 where the token chose the expert, dropped or not, else 0; float32.
        mass_TE: a token's routing weights over their sum, float32; rows of tokens that reach no expert are 0.
        first_T, second_T: best and second choice, int64; E if there is none.
    """

    chosen_TE: Tensor
    mass_TE: Tensor
    first_T: Tensor
    second_T: Tensor


def choices(routing: Routing) -> LayerChoice:
    """The choices in a routing."""
    num_tokens, num_experts = routing.probs_TE.shape
    ids_TK = routing.expert_ids_TK
    table_TE = torch.zeros(num_tokens, num_experts + 1, device=ids_TK.device)
    weights_TK = routing.weights_TK.float().clamp(min=0)
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp(min=1e-20)
    none_T = torch.full_like(ids_TK[:, 0], num_experts)
    return LayerChoice(
        table_TE.scatter(1, ids_TK, 1.0)[:, :num_experts],
        table_TE.scatter_add(1, ids_TK, weights_TK)[:, :num_experts],
        ids_TK[:, 0],
        ids_TK[:, 1] if ids_TK.shape[1] > 1 else none_T,
    )


class PairCounts:
    """Tokens by two experts, int64 on the CPU.

    Attributes:
        together_LEE: chose both in one layer; the diagonal is the load.
        next_LEE: chose the first in a layer and the second in the next; L - 1 layers.
        first_second_LEE: chose the first first and the second second.
    """

    def __init__(self, num_layers: int, num_experts: int) -> None:
        square = (num_experts, num_experts)
        self.together_LEE = torch.zeros(num_layers, *square, dtype=torch.int64)
        self.next_LEE = torch.zeros(num_layers - 1, *square, dtype=torch.int64)
        self.first_second_LEE = torch.zeros(num_layers, *square, dtype=torch.int64)

    def add(self, layers: Sequence[LayerChoice]) -> None:
        """Add the tokens of a forward pass, at most 2**24, up to which float32 counts exactly."""
        num_experts = self.together_LEE.shape[1]
        for layer, choice in enumerate(layers):
            self.together_LEE[layer] += _count(choice.chosen_TE.T @ choice.chosen_TE)
            has_two = (choice.first_T < num_experts) & (choice.second_T < num_experts)
            pairs = choice.first_T[has_two] * num_experts + choice.second_T[has_two]
            self.first_second_LEE[layer] += (
                torch.bincount(pairs, minlength=num_experts**2).view(num_experts, -1).cpu()
            )
        for layer, (choice, following) in enumerate(pairwise(layers)):
            self.next_LEE[layer] += _count(choice.chosen_TE.T @ following.chosen_TE)


class LabelCounts:
    """Routing weight of each expert on tokens of each label, as they are and permuted.

    Attributes:
        mass_LEM: float64.
        permuted_RLEM: the same in each permutation, float32.
    """

    def __init__(self, labels: Labels, num_layers: int, num_experts: int) -> None:
        self.labels = labels
        shape = (num_layers, num_experts, len(labels.names))
        self.mass_LEM = torch.zeros(shape, dtype=torch.float64)
        self.permuted_RLEM = torch.zeros(labels.permutations, *shape)

    def add(self, layers: Sequence[LayerChoice], sequences: slice) -> None:
        """Add the tokens of these sequences of the text."""
        num_labels = len(self.labels.names)
        device = layers[0].mass_TE.device
        ids_T = torch.from_numpy(self.labels.ids_NS[sequences]).flatten().to(device)
        label_TM = F.one_hot(ids_T, num_labels).float()
        for layer, choice in enumerate(layers):
            self.mass_LEM[layer] += (choice.mass_TE.T @ label_TM).double().cpu()
        step = max(1, _PIECE // (len(ids_T) * num_labels))
        for start in range(0, self.labels.permutations, step):
            piece = slice(start, min(start + step, self.labels.permutations))
            ids_RT = torch.from_numpy(self.labels.permuted_ids(piece, sequences)).flatten(1).to(device)
            columns_TR = ids_RT.T + num_labels * torch.arange(len(ids_RT), device=device)
            label_TX = torch.zeros(len(ids_T), len(ids_RT) * num_labels, device=device).scatter_(
                1, columns_TR, 1.0
            )
            for layer, choice in enumerate(layers):
                mass_EX = choice.mass_TE.T @ label_TX
                self.permuted_RLEM[piece, layer] += mass_EX.unflatten(1, (-1, num_labels)).transpose(0, 1).cpu()


class TokenCounts:
    """How often each expert was chosen for each of the most frequent tokens.

    Attributes:
        ids_C: those tokens, int64.
        total_C: how often they occur, int64.
        counts_LCE: int64 on the CPU.
    """

    def __init__(self, tokens_NS: np.ndarray, num_layers: int, num_experts: int) -> None:
        ids, counts = np.unique(tokens_NS, return_counts=True)
        most = max(1, MAX_CELLS // (num_layers * num_experts))
        kept = np.sort(np.argsort(-counts, kind="stable")[:most])
        self.ids_C, self.total_C = ids[kept], counts[kept]
        self.counts_LCE = torch.zeros(num_layers, len(kept), num_experts, dtype=torch.int32)

    def add(self, layers: Sequence[LayerChoice], tokens_BS: np.ndarray) -> None:
        """Add the tokens of a forward pass."""
        tokens_T = tokens_BS.reshape(-1)
        places_T = np.searchsorted(self.ids_C, tokens_T).clip(max=len(self.ids_C) - 1)
        rows = np.flatnonzero(self.ids_C[places_T] == tokens_T)
        places = torch.from_numpy(places_T[rows])
        for layer, choice in enumerate(layers):
            chosen_TE = choice.chosen_TE.cpu()[rows].int()
            self.counts_LCE[layer].index_add_(0, places, chosen_TE)


class DriftChoices:
    """The choices of every n-th sequence, kept to be compared with those of another checkpoint.

    Attributes:
        chosen_LTW: the set of experts as bits, uint8.
        first_LT, second_LT: int32; E if there is none.
    """

    def __init__(self, num_sequences: int, length: int, num_layers: int, num_experts: int) -> None:
        per_sequence = num_layers * length * (-(-num_experts // 8) + 8)
        self.every = -(-num_sequences * per_sequence // MAX_DRIFT_BYTES)
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, layers: Sequence[LayerChoice], sequences: slice) -> None:
        """Add the tokens of these sequences of the text."""
        numbers = np.arange(sequences.start, sequences.stop)
        rows_B = np.flatnonzero(numbers % self.every == 0)

        def kept(values: Tensor) -> np.ndarray:
            return values.unflatten(0, (len(numbers), -1)).cpu().numpy()[rows_B].reshape(-1, *values.shape[1:])

        bits = np.stack([np.packbits(kept(choice.chosen_TE).astype(bool), axis=1) for choice in layers])
        first = np.stack([kept(choice.first_T).astype(np.int32) for choice in layers])
        second = np.stack([kept(choice.second_T).astype(np.int32) for choice in layers])
        self._parts.append((bits, first, second))

    def tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`chosen_LTW`, `first_LT` and `second_LT`."""
        bits, first, second = (np.concatenate(parts, axis=1) for parts in zip(*self._parts, strict=True))
        return bits, first, second


def _count(sums: Tensor) -> Tensor:
    return sums.round().long().cpu()
