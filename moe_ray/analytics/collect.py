"""Passes of a model over held-out text, piece by piece.

Shapes: N sequences, S tokens of each, B sequences of a piece, L MoE layers, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from moe_ray.analytics.counts import MAX_CELLS, DriftChoices, LabelCounts, PairCounts, TokenCounts, choices
from moe_ray.analytics.labels import Labels
from moe_ray.analytics.routing import RoutingSums
from moe_ray.models.router import Routing
from moe_ray.models.transformer import Transformer

# Most tokens of a forward pass, and numbers in one of the tables by token and expert of all layers.
_PIECE_TOKENS = 4096
_PIECE_NUMBERS = 1 << 24
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Collected:
    """What a pass has counted.

    Attributes:
        num_tokens: in all.
        pairs: None where E * E tables for all layers are too large.
        labels: one for each kind of label.
    """

    num_tokens: int
    sums: RoutingSums
    pairs: PairCounts | None
    labels: tuple[LabelCounts, ...]
    tokens: TokenCounts
    drift: DriftChoices


def collect(
    model: Transformer,
    tokens_NS: np.ndarray,
    labels: Sequence[Labels],
    progress: Progress = lambda done, total: None,
) -> Collected:
    """Count everything.

    Args:
        model: in evaluation mode.
        tokens_NS: token ids, int64.
        labels: of these tokens.
        progress: called with the sequences that are done, and all.
    """
    num_layers, num_experts = len(model.config.moe_layers), model.config.num_experts
    device = next(model.parameters()).device
    has_pairs = num_layers * num_experts**2 <= MAX_CELLS
    collected = Collected(
        tokens_NS.size,
        RoutingSums.zeros(num_layers, num_experts, torch.device("cpu")),
        PairCounts(num_layers, num_experts) if has_pairs else None,
        tuple(LabelCounts(of_kind, num_layers, num_experts) for of_kind in labels),
        TokenCounts(tokens_NS, num_layers, num_experts),
        DriftChoices(*tokens_NS.shape, num_layers, num_experts),
    )
    for piece, routings in run_pieces(model, tokens_NS):
        layers = [choices(routing) for routing in routings]
        of_piece = RoutingSums.zeros(num_layers, num_experts, device)
        of_piece.add(routings)
        collected.sums.sums_LX.add_(of_piece.sums_LX.cpu())
        if collected.pairs is not None:
            collected.pairs.add(layers)
        for counts in collected.labels:
            counts.add(layers, piece)
        collected.tokens.add(layers, tokens_NS[piece])
        collected.drift.add(layers, piece)
        progress(piece.stop, len(tokens_NS))
    return collected


def collect_drift(
    model: Transformer, tokens_NS: np.ndarray, progress: Progress = lambda done, total: None
) -> DriftChoices:
    """Only what tells drift, as `collect` does it."""
    choices_of = DriftChoices(*tokens_NS.shape, len(model.config.moe_layers), model.config.num_experts)
    for piece, routings in run_pieces(model, tokens_NS):
        choices_of.add([choices(routing) for routing in routings], piece)
        progress(piece.stop, len(tokens_NS))
    return choices_of


@torch.no_grad()
def run_pieces(model: Transformer, tokens_NS: np.ndarray) -> Iterator[tuple[slice, tuple[Routing, ...]]]:
    """Routings of the sequences, a few at a time, with which ones they are."""
    device = next(model.parameters()).device
    room = _PIECE_NUMBERS // (len(model.config.moe_layers) * model.config.num_experts)
    step = max(1, min(_PIECE_TOKENS, room) // tokens_NS.shape[1])
    for start in range(0, len(tokens_NS), step):
        piece = slice(start, min(start + step, len(tokens_NS)))
        yield piece, model(torch.from_numpy(tokens_NS[piece]).to(device)).routings
