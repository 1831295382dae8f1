"""Keys and values of the active sequences, one fixed region ("slot") a sequence.

A forward pass has one row of T tokens: those of every span, one after another, without padding. The MoE layers
then see exactly the real tokens; only attention knows which token is whose.

Shapes: T tokens of the pass, d decoding sequences, L longest of them, H query heads, h key/value heads,
g = H / h, C query and key head dim, U value head dim, X slots, M max_context, P tokens of a prompt chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ray.config import ModelConfig
from moe_ray.models.attention import LayerCache, Pattern, attend, window_mask
from moe_ray.serving.engine.scheduler import Move, Span


@dataclass(frozen=True)
class _Chunk:
    """Prompt tokens `rows` of the pass; they attend to the first `end` positions of `slot`, masked by window."""

    rows: slice
    slot: int
    end: int
    masks_Pe: dict[int | None, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one forward pass belong, shared by all layers.

    Attributes:
        slot_T, position_T: slot and position of each token, int64.
        num_decoding: the first tokens of the pass; token i is the newest of slot i.
        masks_d11L: by sliding window, which positions each of them attends to; None if all.
        max_length: L.
        chunks: the other tokens.
    """

    slot_T: Tensor
    position_T: Tensor
    num_decoding: int
    masks_d11L: dict[int | None, Tensor | None]
    max_length: int
    chunks: tuple[_Chunk, ...]


def make_layout(spans: Sequence[Span], windows: frozenset[int | None], device: torch.device) -> Layout:
    """Layout of spans given by slot; single tokens of the first slots decode, other spans are chunks.

    Args:
        windows: the sliding windows of the model's layers; None is attention to all.
    """
    num_decoding = next((i for i, span in enumerate(spans) if span.count > 1), len(spans))
    ends = [span.end for span in spans[:num_decoding]]
    masks_d11L = {window: _decoding_mask(ends, window, device) for window in windows}
    slots, positions, chunks = list(range(num_decoding)), [end - 1 for end in ends], []
    for span in spans[num_decoding:]:
        rows = slice(len(slots), len(slots) + span.count)
        positions_P = torch.arange(span.start, span.end, device=device)
        masks_Pe = {window: window_mask(positions_P, span.end, window) for window in windows}
        chunks.append(_Chunk(rows, span.slot, span.end, masks_Pe))
        slots += [span.slot] * span.count
        positions += range(span.start, span.end)
    slot_T, position_T = torch.tensor([slots, positions]).to(device)
    return Layout(slot_T, position_T, num_decoding, masks_d11L, max(ends, default=0), tuple(chunks))


def _decoding_mask(ends: list[int], window: int | None, device: torch.device) -> Tensor | None:
    """Bool of shape [d, 1, 1, L]; None if every token attends to all L positions."""
    longest = max(ends, default=0)
    if min(ends, default=0) == longest and (window is None or window >= longest):
        return None
    return window_mask(torch.tensor(ends) - 1, longest, window)[:, None, None].to(device)


class KVCache:
    """Preallocated keys [X, h, M, C] and values [X, h, M, U] of `num_slots` sequences in every layer."""

    def __init__(
        self, config: ModelConfig, num_slots: int, max_context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_slots, config.num_kv_heads, max_context)
        # Zeros, because masked positions take part with weight 0, which times NaN would still be NaN.
        self._layers = [
            (
                torch.zeros(*shape, config.qk_dim, dtype=dtype, device=device),
                torch.zeros(*shape, config.v_dim, dtype=dtype, device=device),
            )
            for _ in range(config.num_layers)
        ]

    def views(self, layout: Layout) -> list[LayerCache]:
        """One `LayerCache` a layer for a forward pass of this layout."""
        return [_LayerView(k_XhMC, v_XhMU, layout) for k_XhMC, v_XhMU in self._layers]

    def clear(self, slot: int) -> None:
        """Forget what a slot holds."""
        for pair in self._layers:
            for stored in pair:
                stored[slot].zero_()

    def move(self, move: Move) -> None:
        """Copy a sequence to another slot."""
        for pair in self._layers:
            for stored in pair:
                stored[move.target, :, : move.length] = stored[move.source, :, : move.length]


class _LayerView:
    """A `LayerCache`; B is 1 and S is T."""

    def __init__(self, k_XhMC: Tensor, v_XhMU: Tensor, layout: Layout) -> None:
        self._k_XhMC = k_XhMC
        self._v_XhMU = v_XhMU
        self._layout = layout

    def attend(self, q_BHSC: Tensor, k_BhSC: Tensor, v_BhSU: Tensor, pattern: Pattern) -> Tensor:
        """Store the new keys and values, then attend each token to its own sequence: `o_BHSU`."""
        layout = self._layout
        self._k_XhMC[layout.slot_T, :, layout.position_T] = k_BhSC[0].transpose(0, 1)
        self._v_XhMU[layout.slot_T, :, layout.position_T] = v_BhSU[0].transpose(0, 1)
        decoding = layout.num_decoding
        outputs = [self._attend_decoding(q_BHSC[0, :, :decoding], pattern)] if decoding else []
        outputs += [self._attend_chunk(q_BHSC[:, :, chunk.rows], chunk, pattern) for chunk in layout.chunks]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend_decoding(self, q_HdC: Tensor, pattern: Pattern) -> Tensor:
        layout = self._layout
        k_dhLC = self._k_XhMC[: layout.num_decoding, :, : layout.max_length]
        v_dhLU = self._v_XhMU[: layout.num_decoding, :, : layout.max_length]
        # Query heads that share keys stand in as queries of one head: SDPA's own handling of grouped heads
        # copies the keys in bfloat16, 6 times slower at 16 sequences of 512.
        q_dhgC = q_HdC.transpose(0, 1).unflatten(1, (k_dhLC.shape[1], -1))
        o_dhgU = attend(q_dhgC, k_dhLC, v_dhLU, layout.masks_d11L[pattern.window], pattern)
        return o_dhgU.flatten(1, 2).transpose(0, 1).unsqueeze(0)

    def _attend_chunk(self, q_1HPC: Tensor, chunk: _Chunk, pattern: Pattern) -> Tensor:
        k_1heC = self._k_XhMC[chunk.slot : chunk.slot + 1, :, : chunk.end]
        v_1heU = self._v_XhMU[chunk.slot : chunk.slot + 1, :, : chunk.end]
        return attend(q_1HPC, k_1heC, v_1heU, chunk.masks_Pe[pattern.window], pattern)
