"""Grouped-query attention with rotary positions.

Shapes: B batch, S sequence, D model dim, H query heads, h key/value heads, C head dim.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.config import ModelConfig


class LayerCache(Protocol):
    """Keys and values of one layer that a generation engine keeps between forward passes."""

    def attend(self, q_BHSC: Tensor, k_BhSC: Tensor, v_BhSC: Tensor) -> Tensor:
        """Store the new keys and values and return the attention output over all stored ones, `o_BHSC`."""
        ...


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key/value head (Ainslie et al. 2023)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor], cache: LayerCache | None = None) -> Tensor:
        """Attend over the sequence itself, or through `cache` over what it holds as well."""
        q_BHSC = apply_rope(self._split_heads(self.wq(x_BSD)), rope)
        k_BhSC = apply_rope(self._split_heads(self.wk(x_BSD)), rope)
        v_BhSC = self._split_heads(self.wv(x_BSD))
        if cache is not None:
            o_BHSC = cache.attend(q_BHSC, k_BhSC, v_BhSC)
        else:
            o_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BhSC, v_BhSC, is_causal=True, enable_gqa=True)
        return self.wo(o_BHSC.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (x_BSD.shape[-1] // self.head_dim, self.head_dim)).transpose(1, 2)


def rope_cos_sin(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), float32 of shape [B, 1, S, head_dim]."""
    exponent_C = torch.arange(0, head_dim, 2, device=positions_BS.device).float() / head_dim
    angles = positions_BS.float()[:, None, :, None] / theta**exponent_C
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x_BHSC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the two halves of each head against each other (the Hugging Face layout), keeping the dtype."""
    cos, sin = rope
    first, second = x_BHSC.chunk(2, dim=-1)
    return (x_BHSC * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BHSC.dtype)
