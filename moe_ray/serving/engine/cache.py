"""Keys and values of the active sequences, one fixed region ("slot") a sequence.

A forward pass has one row of T tokens: those of every span, one after another, without padding. The MoE layers
then see exactly the real tokens; only attention knows which token is whose.

Shapes: T tokens of the pass, d decoding sequences, L longest of them, H query heads, h key/value heads,
g = H / h, C head dim, X slots, M max_context, P tokens of a prompt chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ray.config import ModelConfig
from moe_ray.models.attention import LayerCache
from moe_ray.serving.engine.scheduler import Move, Span


@dataclass(frozen=True)
class _Chunk:
    """Prompt tokens `rows` of the pass; they attend causally to the first `end` positions of `slot`."""

    rows: slice
    slot: int
    end: int
    mask_Pe: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one forward pass belong, shared by all layers.

    Attributes:
        slot_T, position_T: slot and position of each token, int64.
        num_decoding: the first tokens of the pass; token i is the newest of slot i.
        mask_d11L: which positions each of them attends to; None if all.
        max_length: L.
        chunks: the other tokens.
    """

    slot_T: Tensor
    position_T: Tensor
    num_decoding: int
    mask_d11L: Tensor | None
    max_length: int
    chunks: tuple[_Chunk, ...]


def make_layout(spans: Sequence[Span], device: torch.device) -> Layout:
    """Layout of spans given by slot; single tokens of the first slots decode, other spans are chunks."""
    num_decoding = next((i for i, span in enumerate(spans) if span.count > 1), len(spans))
    ends = [span.end for span in spans[:num_decoding]]
    mask_d11L = None
    if num_decoding and min(ends) < max(ends):
        mask_dL = torch.arange(max(ends)) < torch.tensor(ends)[:, None]
        mask_d11L = mask_dL[:, None, None].to(device)
    slots, positions, chunks = list(range(num_decoding)), [end - 1 for end in ends], []
    for span in spans[num_decoding:]:
        rows = slice(len(slots), len(slots) + span.count)
        mask_Pe = torch.ones(span.count, span.end, dtype=torch.bool, device=device).tril(span.start)
        chunks.append(_Chunk(rows, span.slot, span.end, mask_Pe))
        slots += [span.slot] * span.count
        positions += range(span.start, span.end)
    slot_T, position_T = torch.tensor([slots, positions]).to(device)
    return Layout(slot_T, position_T, num_decoding, mask_d11L, max(ends, default=0), tuple(chunks))


class KVCache:
    """Preallocated keys and values of `num_slots` sequences in every layer, [X, h, M, C] each."""

    def __init__(
        self, config: ModelConfig, num_slots: int, max_context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_slots, config.num_kv_heads, max_context, config.head_dim)
        # Zeros, because masked positions take part with weight 0, which times NaN would still be NaN.
        self._layers = [
            (torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(config.num_layers)
        ]

    def views(self, layout: Layout) -> list[LayerCache]:
        """One `LayerCache` a layer for a forward pass of this layout."""
        return [_LayerView(k_XhMC, v_XhMC, layout) for k_XhMC, v_XhMC in self._layers]

    def move(self, move: Move) -> None:
        """Copy a sequence to another slot."""
        for pair in self._layers:
            for stored_XhMC in pair:
                stored_XhMC[move.target, :, : move.length] = stored_XhMC[move.source, :, : move.length]


class _LayerView:
    """A `LayerCache`; B is 1 and S is T."""

    def __init__(self, k_XhMC: Tensor, v_XhMC: Tensor, layout: Layout) -> None:
        self._k_XhMC = k_XhMC
        self._v_XhMC = v_XhMC
        self._layout = layout

    def attend(self, q_BHSC: Tensor, k_BhSC: Tensor, v_BhSC: Tensor) -> Tensor:
        """Store the new keys and values, then attend each token to its own sequence: `o_BHSC`."""
        layout = self._layout
        self._k_XhMC[layout.slot_T, :, layout.position_T] = k_BhSC[0].transpose(0, 1)
        self._v_XhMC[layout.slot_T, :, layout.position_T] = v_BhSC[0].transpose(0, 1)
        outputs = [self._attend_decoding(q_BHSC[0, :, : layout.num_decoding])] if layout.num_decoding else []
        outputs += [self._attend_chunk(q_BHSC[:, :, chunk.rows], chunk) for chunk in layout.chunks]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend_decoding(self, q_HdC: Tensor) -> Tensor:
        layout = self._layout
        k_dhLC = self._k_XhMC[: layout.num_decoding, :, : layout.max_length]
        v_dhLC = self._v_XhMC[: layout.num_decoding, :, : layout.max_length]
        # Query heads that share keys stand in as queries of one head: SDPA's own handling of grouped heads
        # copies the keys in bfloat16, 6 times slower at 16 sequences of 512.
        q_dhgC = q_HdC.transpose(0, 1).unflatten(1, (k_dhLC.shape[1], -1))
        o_dhgC = F.scaled_dot_product_attention(q_dhgC, k_dhLC, v_dhLC, attn_mask=layout.mask_d11L)
        return o_dhgC.flatten(1, 2).transpose(0, 1).unsqueeze(0)

    def _attend_chunk(self, q_1HPC: Tensor, chunk: _Chunk) -> Tensor:
        k_1heC = self._k_XhMC[chunk.slot : chunk.slot + 1, :, : chunk.end]
        v_1heC = self._v_XhMC[chunk.slot : chunk.slot + 1, :, : chunk.end]
        return F.scaled_dot_product_attention(q_1HPC, k_1heC, v_1heC, attn_mask=chunk.mask_Pe, enable_gqa=True)
