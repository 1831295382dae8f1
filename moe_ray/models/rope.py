"""Rotary positions (Su et al. 2021) and how their frequencies are stretched for longer contexts.

Shapes: B batch, H heads, S sequence, C rotating dims of a head, c = C / 2 frequencies.
"""

import math

import torch
from torch import Tensor

from moe_ray.model_config import ModelConfig, RopeScaling

Rope = tuple[Tensor, Tensor]


def rope_cos_sin(positions_BS: Tensor, config: ModelConfig) -> Rope:
    """Cosines and sines of the positions, float32 of shape [B, 1, S, C]; the second half repeats the first."""
    inverse_c, scale = _frequencies(config, positions_BS.device)
    angles_B1Sc = positions_BS.float()[:, None, :, None] * inverse_c
    angles_B1SC = torch.cat((angles_B1Sc, angles_B1Sc), dim=-1)
    return angles_B1SC.cos() * scale, angles_B1SC.sin() * scale


def apply_rope(x_BHSC: Tensor, rope: Rope) -> Tensor:
    """Rotate the two halves of each head against each other (the Hugging Face layout), keeping the dtype."""
    cos, sin = rope
    first, second = x_BHSC.chunk(2, dim=-1)
    return (x_BHSC * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BHSC.dtype)


def deinterleave(x_BHSC: Tensor) -> Tensor:
    """Neighbouring pairs to halves, for models that rotate pairs (DeepSeek); scores do not see the order."""
    return torch.cat((x_BHSC[..., 0::2], x_BHSC[..., 1::2]), dim=-1)


def softmax_scale(config: ModelConfig) -> float:
    """Factor of attention scores: 1 / sqrt(query width), raised for long contexts as DeepSeek does with YaRN."""
    scale = config.qk_dim**-0.5
    scaling = config.rope_scaling
    if config.attention == "mla" and scaling is not None and scaling.mscale_all_dim:
        scale *= _yarn_scale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def _frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians a token of each pair of dims, float32, and the scale of cosines and sines."""
    dims_c = torch.arange(0, config.rope_dim, 2, device=device).float() / config.rope_dim
    inverse_c = 1.0 / config.rope_theta**dims_c
    scaling = config.rope_scaling
    if scaling is None:
        return inverse_c, 1.0
    if scaling.type == "linear":
        return inverse_c / scaling.factor, 1.0
    if scaling.type == "llama3":
        return _llama3(inverse_c, scaling), 1.0
    return _yarn(inverse_c, scaling, config), _attention_factor(scaling)


def _llama3(inverse_c: Tensor, scaling: RopeScaling) -> Tensor:
    """Slow pairs interpolated, fast ones kept, those between mixed (Llama 3.1)."""
    assert scaling.original_length is not None
    turns_c = scaling.original_length * inverse_c / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_c = ((turns_c - low) / (high - low)).clamp(0, 1)
    return inverse_c * (kept_c + (1 - kept_c) / scaling.factor)


def _yarn(inverse_c: Tensor, scaling: RopeScaling, config: ModelConfig) -> Tensor:
    """Peng et al. 2023, 3.2: pairs that turn often in the original context are kept, slow ones interpolated."""
    length = scaling.original_length
    assert length is not None

    def dim_of(turns: float) -> float:
        ratio = length / (turns * 2 * math.pi)
        return config.rope_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rope_dim - 1)
    width = (high - low) or 0.001
    dims_c = torch.arange(inverse_c.numel(), device=inverse_c.device).float()
    interpolated_c = ((dims_c - low) / width).clamp(0, 1)
    return inverse_c * (interpolated_c / scaling.factor + 1 - interpolated_c)


def _attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_scale(scaling.factor, scaling.mscale) / _yarn_scale(scaling.factor, scaling.mscale_all_dim)
    return _yarn_scale(scaling.factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    """Peng et al. 2023, eq. 22."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
