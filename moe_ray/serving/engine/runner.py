"""One forward pass of the model over tokens that a layout places in the paged cache.

Shapes: T tokens of the pass, D model dim, B rows that get a token, V vocabulary, H query heads, h key/value heads,
C query and key head dim, U value head dim, X blocks, P tokens of a block; of spans that attend together: s spans,
p tokens of each, H' = h and p' = p * H / h where query heads stand in as queries, n blocks and L tokens of the
longest.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from moe_ray.models.attention import Pattern, attend, window_mask
from moe_ray.models.transformer import Transformer
from moe_ray.serving.engine.cache import KVCache
from moe_ray.serving.engine.layout import Layout

Masks = dict[int | None, Tensor | None]


class Runner(Protocol):
    """What computes the model for the engine."""

    def forward(self, tokens_T: np.ndarray, layout: Layout) -> Tensor:
        """Normalised final hidden states `hidden_TD` of token ids (int64); stores the new keys and values."""
        ...

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """Logits of hidden states, float32 `logits_BV`."""
        ...


class TorchRunner:
    """Runs any model on any device: `Transformer` itself, with views of the cache."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model = model
        self._cache = cache
        self._device = model.embed.weight.device
        self.dtype = model.embed.weight.dtype
        self._windows = frozenset(map(model.config.window, range(model.config.num_layers)))

    def forward(self, tokens_T: np.ndarray, layout: Layout) -> Tensor:
        """See `Runner`."""
        pass_ = _make_pass(layout, self._cache, self._windows, self._device)
        views = [_LayerView(k_XhPC, v_XhPU, pass_) for k_XhPC, v_XhPU in self._cache.layers]
        positions_1T = layout.position_T.to(self._device)[None]
        return self._model(torch.from_numpy(tokens_T).to(self._device)[None], positions_1T, views).hidden_BSD[0]

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """See `Runner`."""
        return self._model.logits(hidden_BD).float()


@dataclass(frozen=True)
class _Group:
    """Spans that attend in one call: all that decode, or a chunk of a prompt.

    Attributes:
        rows: their tokens in the pass.
        gather: int64 [s * h * n], where their blocks are in a cache seen as [X * h, P * C].
        num_spans: s.
        length: L.
        masks: by sliding window, bool broadcastable to [s, h, p, L]; None if all L are seen.
    """

    rows: slice
    gather: Tensor
    num_spans: int
    length: int
    masks: Masks


@dataclass(frozen=True)
class _Pass:
    """A layout as attention needs it, on the device; `fresh_F` are the blocks that this pass begins."""

    block_T: Tensor
    offset_T: Tensor
    fresh_F: Tensor
    groups: tuple[_Group, ...]


def _make_pass(layout: Layout, cache: KVCache, windows: Iterable[int | None], device: torch.device) -> _Pass:
    block_T, offset_T = layout.block_T, layout.position_T % cache.block_tokens
    decoding = layout.num_decoding
    counts = layout.spans_S3[:, 2].tolist()
    end_S = (layout.spans_S3[:, 1] + layout.spans_S3[:, 2]).tolist()
    spans = [slice(0, decoding)] if decoding else []
    spans += [slice(index, index + 1) for index in range(decoding, len(counts))]
    groups, begin = [], 0
    for span in spans:
        rows = slice(begin, begin + sum(counts[span]))
        length = max(end_S[span])
        positions = layout.position_T[rows]
        masks = {window: _mask(positions, length, window, span == slice(0, decoding)) for window in windows}
        gather = _gather(layout.tables_SB[span], cache, length)
        on_device = {window: None if mask is None else mask.to(device) for window, mask in masks.items()}
        groups.append(_Group(rows, gather.to(device), span.stop - span.start, length, on_device))
        begin = rows.stop
    fresh_F = block_T[offset_T == 0]
    return _Pass(block_T.to(device), offset_T.to(device), fresh_F.to(device), tuple(groups))


def _gather(tables_sB: Tensor, cache: KVCache, length: int) -> Tensor:
    heads = cache.layers[0][0].shape[1]
    tables_s1n = tables_sB[:, None, : -(-length // cache.block_tokens)]
    return (tables_s1n * heads + torch.arange(heads)[:, None]).flatten()


def _mask(positions: Tensor, length: int, window: int | None, decoding: bool) -> Tensor | None:
    """Which keys are seen; None if all are, as by texts of one length."""
    if not decoding:
        return window_mask(positions, length, window)
    if int(positions.min()) + 1 == length and (window is None or window >= length):
        return None
    return window_mask(positions, length, window)[:, None, None]


class _LayerView:
    """A `LayerCache` of one layer in one pass; its B is 1 and its S is T."""

    def __init__(self, k_XhPC: Tensor, v_XhPU: Tensor, pass_: _Pass) -> None:
        self._k_XhPC = k_XhPC
        self._v_XhPU = v_XhPU
        self._pass = pass_

    def attend(self, q_BHSC: Tensor, k_BhSC: Tensor, v_BhSU: Tensor, pattern: Pattern) -> Tensor:
        """Store the new keys and values, then attend each token to its own sequence: `o_BHSU`."""
        pass_ = self._pass
        for stored, new in ((self._k_XhPC, k_BhSC), (self._v_XhPU, v_BhSU)):
            # Masked positions take part with weight 0, which times a NaN that an earlier text left is NaN.
            stored.index_fill_(0, pass_.fresh_F, 0)
            stored[pass_.block_T, :, pass_.offset_T] = new[0].transpose(0, 1)
        outputs = [self._attend_group(q_BHSC[0, :, group.rows], group, pattern) for group in pass_.groups]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend_group(self, q_HtC: Tensor, group: _Group, pattern: Pattern) -> Tensor:
        k_shLC, v_shLU = self._read(self._k_XhPC, group), self._read(self._v_XhPU, group)
        mask = group.masks[pattern.window]
        if group.num_spans != q_HtC.shape[1]:
            return attend(q_HtC[None], k_shLC, v_shLU, mask, pattern)
        # Query heads that share keys stand in as queries of one head: SDPA's own handling of grouped heads
        # copies the keys in bfloat16, 6 times slower at 16 sequences of 512.
        q_shgC = q_HtC.transpose(0, 1).unflatten(1, (k_shLC.shape[1], -1))
        return attend(q_shgC, k_shLC, v_shLU, mask, pattern).flatten(1, 2).transpose(0, 1).unsqueeze(0)

    def _read(self, stored: Tensor, group: _Group) -> Tensor:
        """Blocks of a group one after another: [s, h, L, C]."""
        heads, width = stored.shape[1], stored.shape[3]
        blocks = stored.view(stored.shape[0] * heads, -1).index_select(0, group.gather)
        return blocks.view(group.num_spans, heads, -1, width)[:, :, : group.length]
