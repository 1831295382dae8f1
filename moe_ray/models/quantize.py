"""Experts with weights of 8 or 4 bits; everything else keeps its type.

int8 has one scale a row (Dettmers et al. 2022, without outliers); int4 a scale and a lowest value for each 32
neighbouring columns. Products are taken with the values that the codes stand for, in the type of the input.

Shapes: N rows and D columns of a weight, q = D / 32 groups of columns, R rows (routed tokens, grouped by expert),
F expert hidden dim, G = 2 * F where gated, else F, e experts.
"""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError
from moe_ray.models.activations import make_activation
from moe_ray.models.experts import GroupedExperts, grouped_feed_forward
from moe_ray.models.transformer import Transformer
from moe_ray.section import Quantize

Scheme = Literal["int8", "int4"]
GROUP = 32
# How far groups of 4 bits are narrowed in search of the least squared error.
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)


def quantize(w_ND: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight of shape [..., N, D].

    Returns:
        For int8, codes int8 [..., N, D] and scales float32 [..., N]: value = scale * code. For int4, codes uint8
        [..., N, D / 2], of each group first the byte that holds columns 0 (low half) and 16 (high half), and
        bfloat16 pairs [..., N, q, 2]: value = pair[0] * code + pair[1].
    """
    w_ND = w_ND.float()
    if scheme == "int8":
        scale_N = (w_ND.abs().amax(dim=-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return (w_ND / scale_N[..., None]).round().to(torch.int8), scale_N
    w_Nq32 = w_ND.unflatten(-1, (-1, GROUP))
    pair_Nq2 = _best_pairs(w_Nq32)
    codes_Nqh = _codes(w_Nq32, pair_Nq2).to(torch.uint8).unflatten(-1, (2, GROUP // 2))
    return (codes_Nqh[..., 0, :] | codes_Nqh[..., 1, :] << 4).flatten(-2), pair_Nq2


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` stands for, [..., N, D]."""
    if codes.dtype == torch.int8:
        return (codes.float() * scales[..., None]).to(dtype)
    bytes_Nq = codes.unflatten(-1, (-1, GROUP // 2))
    codes_Nq32 = torch.cat((bytes_Nq & 15, bytes_Nq >> 4), dim=-1).float()
    pair_Nq2 = scales.float()
    return (codes_Nq32 * pair_Nq2[..., :1] + pair_Nq2[..., 1:]).flatten(-2).to(dtype)


def _best_pairs(w_Nq32: Tensor) -> Tensor:
    """The pair of each group with the least squared error among ranges that leave out a little at both ends."""
    low, high = w_Nq32.amin(dim=-1), w_Nq32.amax(dim=-1)
    middle, best, least = (low + high) / 2, None, None
    for shrink in _SHRINK:
        lowest = middle + (low - middle) * shrink
        pair_Nq2 = torch.stack(((high - low) * shrink / 15, lowest), dim=-1).bfloat16()
        values = _codes(w_Nq32, pair_Nq2) * pair_Nq2[..., :1].float() + pair_Nq2[..., 1:].float()
        error = (values - w_Nq32).square().sum(dim=-1)
        better = error < least if least is not None else torch.ones_like(error, dtype=torch.bool)
        best = pair_Nq2 if best is None else torch.where(better[..., None], pair_Nq2, best)
        least = error if least is None else torch.minimum(error, least)
    assert best is not None
    return best


def _codes(w_Nq32: Tensor, pair_Nq2: Tensor) -> Tensor:
    scale = pair_Nq2[..., :1].float()
    codes = (w_Nq32 - pair_Nq2[..., 1:].float()) / torch.where(scale == 0, 1.0, scale)
    return codes.round().clamp(0, 15)


class QuantizedExperts(nn.Module):
    """Takes the place of `GroupedExperts` in a model that only generates.

    Attributes:
        scheme: of their weights.
        first_expert: as in `GroupedExperts`, which is 0 of all.
        w_in_codes_e, w_in_scales_e: the first matrix of each expert, [e, G, D], as `quantize` gives it.
        w_out_codes_e, w_out_scales_e: the second, [e, D, F].
    """

    first_expert = 0
    w_in_codes_e: Tensor
    w_in_scales_e: Tensor
    w_out_codes_e: Tensor
    w_out_scales_e: Tensor
    b_in_eG: Tensor | None
    b_out_eD: Tensor | None

    def __init__(self, config: ModelConfig, scheme: Scheme) -> None:
        super().__init__()
        check_quantizable(config, scheme)
        self.scheme: Scheme = scheme
        self.activation = make_activation(config)
        experts, dim, hidden = config.num_experts, config.dim, config.expert_dim
        width = 2 * hidden if config.is_gated else hidden
        for name, rows, columns in (("w_in", width, dim), ("w_out", dim, hidden)):
            codes, scales = _empty(experts, rows, columns, scheme)
            self.register_buffer(f"{name}_codes_e", codes)
            self.register_buffer(f"{name}_scales_e", scales)
        self.register_buffer("b_in_eG", torch.empty(experts, width) if config.expert_ffn_bias else None)
        self.register_buffer("b_out_eD", torch.empty(experts, dim) if config.expert_ffn_bias else None)

    @torch.no_grad()
    def fill(self, experts: GroupedExperts) -> None:
        """Take over the weights of all experts, one at a time."""
        for index in range(experts.num_local_experts):
            for name, weight in (("w_in", experts.w_in_eGD), ("w_out", experts.w_out_eDF)):
                codes, scales = quantize(weight[index], self.scheme)
                getattr(self, f"{name}_codes_e")[index] = codes
                getattr(self, f"{name}_scales_e")[index] = scales
        if self.b_in_eG is not None and self.b_out_eD is not None:
            self.b_in_eG.copy_(cast(Tensor, experts.b_in_eG))
            self.b_out_eD.copy_(cast(Tensor, experts.b_out_eD))

    def forward(self, x_RD: Tensor, tokens_per_expert_e: Tensor, max_kept_rows: int | None = None) -> Tensor:
        """As `GroupedExperts.forward`, without gradients; only experts that have rows are read."""
        chosen_c = tokens_per_expert_e.nonzero().squeeze(1)
        w_in = dequantize(self.w_in_codes_e[chosen_c], self.w_in_scales_e[chosen_c], x_RD.dtype)
        w_out = dequantize(self.w_out_codes_e[chosen_c], self.w_out_scales_e[chosen_c], x_RD.dtype)
        b_in = None if self.b_in_eG is None else self.b_in_eG[chosen_c]
        b_out = None if self.b_out_eD is None else self.b_out_eD[chosen_c]
        return grouped_feed_forward(x_RD, tokens_per_expert_e[chosen_c], w_in, w_out, b_in, b_out, self.activation)


def quantize_experts(model: Transformer, scheme: Scheme) -> None:
    """Replace the experts of every MoE layer, layer by layer; the model then only generates.

    Raises:
        ConfigError: int4 does not divide the widths.
    """
    for moe in model.moe_modules():
        experts = moe.experts
        assert isinstance(experts, GroupedExperts)
        with torch.device(experts.w_in_eGD.device):
            quantized = QuantizedExperts(model.config, scheme)
        quantized.fill(experts)
        moe.register_module("experts", quantized.eval())


def scheme_of(model: Transformer) -> Quantize:
    """How the weights of a model's experts are quantized."""
    experts = next(model.moe_modules()).experts
    return experts.scheme if isinstance(experts, QuantizedExperts) else "none"


def check_quantizable(config: ModelConfig, scheme: Scheme) -> None:
    """Raise a ConfigError unless experts of these widths can have this scheme."""
    for name in ("dim", "expert_dim"):
        width = getattr(config, name)
        if scheme == "int4" and width % GROUP:
            raise ConfigError(
                f"model.{name}={width} is no multiple of {GROUP}, which int4 groups by.", "quantize to int8."
            )


def _empty(experts: int, rows: int, columns: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    if scheme == "int8":
        return torch.empty(experts, rows, columns, dtype=torch.int8), torch.empty(experts, rows)
    codes = torch.empty(experts, rows, columns // 2, dtype=torch.uint8)
    return codes, torch.empty(experts, rows, columns // GROUP, 2, dtype=torch.bfloat16)
