"""Look at a text with the model, apart from the texts that are being generated.

Shapes: B batch (1), S tokens of a piece, L tokens so far, D model dim, H query heads, h key/value heads, C query
and key head dim, U value head dim, V vocabulary, K experts a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from moe_ray.models.attention import Pattern, attend, window_mask
from moe_ray.models.transformer import Output, Transformer
from moe_ray.serving.engine.request import TokenLogprob
from moe_ray.serving.engine.sampler import top_logprobs
from moe_ray.serving.engine.service import EngineService

# As many prompt tokens as a step of the engine takes, so that running texts are held up no longer.
_PIECE_TOKENS = 256
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of the text, from `start` on, and what the model makes of them."""

    start: int
    output: Output


async def probe(
    thread: EngineService, model: Transformer, token_ids: Sequence[int], look: Callable[[Piece], T]
) -> list[T]:
    """What `look` finds in each piece of a text; both run on the engine's thread, where other texts take turns.

    Raises:
        RequestError: the engine has stopped or is too busy (503).
    """
    caches = [_GrowingCache() for _ in model.layers]

    @torch.inference_mode()
    def run(start: int) -> T:
        tokens_1S = torch.tensor([token_ids[start : start + _PIECE_TOKENS]], device=model.embed.weight.device)
        positions_1S = torch.arange(start, start + tokens_1S.shape[1], device=tokens_1S.device)[None]
        return look(Piece(start, model(tokens_1S, positions_1S, caches)))

    return [await thread.call(lambda s=start: run(s)) for start in range(0, len(token_ids), _PIECE_TOKENS)]


async def prompt_logprobs(
    thread: EngineService, model: Transformer, token_ids: Sequence[int], vocab_size: int, count: int
) -> list[TokenLogprob]:
    """Log-probabilities of the tokens after the first, with the `count` most likely ones in the place of each.

    Args:
        vocab_size: only so many tokens can come.
    """

    def look(piece: Piece) -> list[TokenLogprob]:
        following = token_ids[piece.start + 1 : piece.start + 1 + piece.output.hidden_BSD.shape[1]]
        hidden_SD = piece.output.hidden_BSD[0, : len(following)]
        logits_SV = model.logits(hidden_SD)[:, :vocab_size].float()
        token_S = torch.tensor(following, dtype=torch.int64, device=logits_SV.device)
        found = top_logprobs(logits_SV, token_S, [count] * len(following))
        return [
            TokenLogprob(token, 0, logprob.chosen, logprob.top)
            for token, logprob in zip(following, found, strict=True)
        ]

    pieces = await probe(thread, model, token_ids, look)
    return [logprob for piece in pieces for logprob in piece]


async def mean_hidden(thread: EngineService, model: Transformer, token_ids: Sequence[int]) -> Tensor:
    """Mean of the normalised final hidden states of a text, float32 of shape [D]."""

    def look(piece: Piece) -> Tensor:
        return piece.output.hidden_BSD[0].float().sum(dim=0).cpu()

    return torch.stack(await probe(thread, model, token_ids, look)).sum(dim=0) / len(token_ids)


async def routing(
    thread: EngineService, model: Transformer, token_ids: Sequence[int]
) -> list[tuple[list[list[int]], list[list[float]]]]:
    """Experts and their weights of each token, best first, of each MoE layer."""

    def look(piece: Piece) -> list[tuple[list[list[int]], list[list[float]]]]:
        return [_chosen(r.expert_ids_TK, r.weights_TK, r.num_experts) for r in piece.output.routings]

    pieces = await probe(thread, model, token_ids, look)
    return [
        ([row for experts, _ in layer for row in experts], [row for _, weights in layer for row in weights])
        for layer in zip(*pieces, strict=True)
    ]


def _chosen(ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> tuple[list[list[int]], list[list[float]]]:
    pairs = list(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True))
    # A token may have fewer than K experts.
    kept = [[(e, w) for e, w in zip(ids, weights, strict=True) if e < num_experts] for ids, weights in pairs]
    return [[e for e, _ in row] for row in kept], [[w for _, w in row] for row in kept]


class _GrowingCache:
    """A `LayerCache` of one sequence."""

    def __init__(self) -> None:
        self._k_BhLC: Tensor | None = None
        self._v_BhLU: Tensor | None = None

    def attend(self, q_BHSC: Tensor, k_BhSC: Tensor, v_BhSU: Tensor, pattern: Pattern) -> Tensor:
        """Append keys and values and attend to all: `o_BHSU`."""
        self._k_BhLC = k_BhSC if self._k_BhLC is None else torch.cat((self._k_BhLC, k_BhSC), dim=2)
        self._v_BhLU = v_BhSU if self._v_BhLU is None else torch.cat((self._v_BhLU, v_BhSU), dim=2)
        length, new = self._k_BhLC.shape[2], k_BhSC.shape[2]
        positions_S = torch.arange(length - new, length, device=q_BHSC.device)
        mask_SL = window_mask(positions_S, length, pattern.window)
        return attend(q_BHSC, self._k_BhLC, self._v_BhLU, mask_SL, pattern)
