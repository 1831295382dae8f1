"""Self-attention with rotary positions: grouped-query and multi-head latent.

Shapes: B batch, S sequence, L keys, D model dim, H query heads, h key/value heads, C query and key head dim,
U value head dim.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.models.cpu_attention import causal_attention, is_faster
from moe_ray.models.rope import Rope, apply_rope, deinterleave, softmax_scale


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, and how scores become weights.

    Attributes:
        scale: factor of the scores.
        window: newest tokens that are seen, the query's own included; None: all up to it.
        sinks_H: a logit a head that takes part in the softmax and brings no value; None: none. Where heads that
            share keys stand in as queries of one head, so do their sinks.
    """

    scale: float
    window: int | None = None
    sinks_H: Tensor | None = None


class LayerCache(Protocol):
    """Keys and values of one layer that a generation engine keeps between forward passes."""

    def attend(self, q_BHSC: Tensor, k_BhSC: Tensor, v_BhSU: Tensor, pattern: Pattern) -> Tensor:
        """Store the new keys and values and return the attention output over all stored ones, `o_BHSU`."""
        ...


class Attention(nn.Module):
    """Causal attention in which groups of query heads share a key/value head (Ainslie et al. 2023).

    By setting: RMSNorm of queries and keys (Qwen3 by head, OLMoE over all heads), clipping (OLMoE), biases,
    sliding window (Mistral), sinks (gpt-oss).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window = config.window(layer)
        q_dim, kv_dim = config.num_heads * config.qk_dim, config.num_kv_heads * config.qk_dim
        bias = config.attention_bias
        self.wq = nn.Linear(config.dim, q_dim, bias=bias)
        self.wk = nn.Linear(config.dim, kv_dim, bias=bias)
        self.wv = nn.Linear(config.dim, kv_dim, bias=bias)
        self.wo = nn.Linear(q_dim, config.dim, bias=bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            widths = (q_dim, kv_dim) if config.qk_norm == "full" else (config.qk_dim, config.qk_dim)
            self.q_norm, self.k_norm = (nn.RMSNorm(width, eps=config.norm_eps) for width in widths)
        self.sinks_H = nn.Parameter(torch.empty(config.num_heads)) if config.attention_sinks else None

    def forward(self, x_BSD: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        """Attend over the sequence itself, or through `cache` over what it holds as well."""
        q_BHSC = apply_rope(self._heads(self.wq(x_BSD), self.q_norm), rope)
        k_BhSC = apply_rope(self._heads(self.wk(x_BSD), self.k_norm), rope)
        v_BhSU = self._heads(self.wv(x_BSD), None)
        pattern = Pattern(softmax_scale(self.config), self.window, self.sinks_H)
        attend = attend_causally if cache is None else cache.attend
        return self.wo(attend(q_BHSC, k_BhSC, v_BhSU, pattern).transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Normalise and clip what was projected and split it into heads: [B, heads, S, C]."""
        if norm is not None and self.config.qk_norm == "full":
            x = norm(x)
        if self.config.clip_qkv is not None:
            x = x.clamp(-self.config.clip_qkv, self.config.clip_qkv)
        x = x.unflatten(-1, (x.shape[-1] // self.config.qk_dim, self.config.qk_dim))
        if norm is not None and self.config.qk_norm == "head":
            x = norm(x)
        return x.transpose(1, 2)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-AI 2024, 2.1.1): keys and values come from one narrow latent.

    A head's query and key are a part without position and one that rotates; the rotating part of the key is
    shared by all heads.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.window = config.window(layer)
        bias, q_dim = config.attention_bias, config.num_heads * config.qk_dim
        self.wq = self.wq_down = self.q_norm = self.wq_up = None
        if config.q_lora_rank is None:
            self.wq = nn.Linear(config.dim, q_dim, bias=False)
        else:
            self.wq_down = nn.Linear(config.dim, config.q_lora_rank, bias=bias)
            # Its epsilon is the default of the original code, whatever that of the other norms.
            self.q_norm = nn.RMSNorm(config.q_lora_rank, eps=1e-6)
            self.wq_up = nn.Linear(config.q_lora_rank, q_dim, bias=False)
        self.wkv_down = nn.Linear(config.dim, config.kv_lora_rank + config.qk_rope_head_dim, bias=bias)
        self.kv_norm = nn.RMSNorm(config.kv_lora_rank, eps=1e-6)
        up_dim = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.wkv_up = nn.Linear(config.kv_lora_rank, up_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * config.v_head_dim, config.dim, bias=bias)
        self.sinks_H = nn.Parameter(torch.empty(config.num_heads)) if config.attention_sinks else None

    def forward(self, x_BSD: Tensor, rope: Rope, cache: LayerCache | None = None) -> Tensor:
        """Attend over the sequence itself, or through `cache` over what it holds as well."""
        config = self.config
        q_BHSC = self._queries(x_BSD).unflatten(-1, (config.num_heads, config.qk_dim)).transpose(1, 2)
        q_nope, q_rope = q_BHSC.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        latent, k_rope = self.wkv_down(x_BSD).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        kv = self.wkv_up(self.kv_norm(latent)).unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
        k_nope, v_BHSU = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        k_rope = self._rotate(k_rope.unsqueeze(1), rope).expand(-1, config.num_heads, -1, -1)
        q_BHSC = torch.cat((q_nope, self._rotate(q_rope, rope)), dim=-1)
        k_BHSC = torch.cat((k_nope, k_rope), dim=-1)
        pattern = Pattern(softmax_scale(config), self.window, self.sinks_H)
        attend = attend_causally if cache is None else cache.attend
        return self.wo(attend(q_BHSC, k_BHSC, v_BHSU, pattern).transpose(1, 2).flatten(2))

    def _queries(self, x_BSD: Tensor) -> Tensor:
        if self.wq is not None:
            return self.wq(x_BSD)
        assert self.wq_down is not None
        assert self.q_norm is not None
        assert self.wq_up is not None
        return self.wq_up(self.q_norm(self.wq_down(x_BSD)))

    def _rotate(self, x_BHSC: Tensor, rope: Rope) -> Tensor:
        return apply_rope(deinterleave(x_BHSC) if self.config.rope_interleaved else x_BHSC, rope)


def attend_causally(q_BHSC: Tensor, k_BhSC: Tensor, v_BhSU: Tensor, pattern: Pattern) -> Tensor:
    """Attention of a sequence to itself: `o_BHSU`."""
    length = q_BHSC.shape[2]
    has_window = pattern.window is not None and pattern.window < length
    if not has_window and pattern.sinks_H is None and is_faster(q_BHSC):
        return causal_attention(q_BHSC, k_BhSC, v_BhSU, pattern.scale)
    mask_SS = None
    if has_window:
        mask_SS = window_mask(torch.arange(length, device=q_BHSC.device), length, pattern.window)
    # Fused kernels want one width for all; without them the scores of all pairs would be in memory.
    v_width = v_BhSU.shape[3]
    v_BhSC = F.pad(v_BhSU, (0, max(0, q_BHSC.shape[3] - v_width)))
    return attend(q_BHSC, k_BhSC, v_BhSC, mask_SS, pattern, is_causal=True)[..., :v_width]


def window_mask(positions_S: Tensor, num_keys: int, window: int | None) -> Tensor:
    """Which of `num_keys` keys the queries at these positions see, bool of shape [S, L]."""
    keys_L = torch.arange(num_keys, device=positions_S.device)
    mask_SL = keys_L <= positions_S[:, None]
    return mask_SL if window is None else mask_SL & (keys_L > positions_S[:, None] - window)


def attend(
    q_BHSC: Tensor, k_BhLC: Tensor, v_BhLU: Tensor, mask: Tensor | None, pattern: Pattern, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention with sinks: `o_BHSU`.

    Args:
        mask: bool, broadcastable to [B, H, S, L]; None: every key, or with `is_causal` those up to the query.
        pattern: its window is the caller's business.
    """
    if pattern.sinks_H is not None:
        return _attend_with_sinks(q_BHSC, k_BhLC, v_BhLU, mask, pattern.sinks_H, pattern.scale, is_causal)
    is_causal = is_causal and mask is None
    grouped = q_BHSC.shape[1] != k_BhLC.shape[1]
    return F.scaled_dot_product_attention(
        q_BHSC, k_BhLC, v_BhLU, mask, is_causal=is_causal, scale=pattern.scale, enable_gqa=grouped
    )


def _attend_with_sinks(
    q_BHSC: Tensor,
    k_BhLC: Tensor,
    v_BhLU: Tensor,
    mask: Tensor | None,
    sinks_H: Tensor,
    scale: float,
    is_causal: bool,
) -> Tensor:
    """Attention with one more key in front, whose score is the sink and whose value is zero.

    The score is a product like the others: one more dim holds the sink in queries and a one in that key. So
    the fused kernels do it all, where a bias of the scores would take memory for each pair of tokens.
    """
    num_heads, width, extra = q_BHSC.shape[1], q_BHSC.shape[3], 8
    sinks = (sinks_H / scale).to(q_BHSC.dtype).view(1, num_heads, -1, 1)
    sinks = F.pad(sinks, (0, extra - 1)).expand(*q_BHSC.shape[:3], extra)
    q_BHSC = torch.cat((q_BHSC, sinks), dim=-1)
    k_BhLC = F.pad(k_BhLC, (0, extra, 1, 0))
    k_BhLC[:, :, 0, width] = 1
    v_width = v_BhLU.shape[3]
    v_BhLU = F.pad(v_BhLU, (0, width + extra - v_width, 1, 0))
    grouped = num_heads != k_BhLC.shape[1]
    if is_causal and mask is None:
        # A query in front for the key in front, so that each sees as many keys as there are queries up to it.
        q_BHSC = F.pad(q_BHSC, (0, 0, 1, 0))
        o = F.scaled_dot_product_attention(
            q_BHSC, k_BhLC, v_BhLU, is_causal=True, scale=scale, enable_gqa=grouped
        )[:, :, 1:]
    else:
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
        o = F.scaled_dot_product_attention(q_BHSC, k_BhLC, v_BhLU, mask, scale=scale, enable_gqa=grouped)
    return o[..., :v_width]
