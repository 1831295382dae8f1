"""Activations of feed-forward layers, each as a pair: the function, and its gradient written by hand.

Autograd would keep and re-read several tensors of the widest kind in the model; the pairs allocate one each.

Shapes: R rows, F hidden dim, G = 2 * F where gated (gate half first, then up half), else F.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ray.config import ModelConfig


@dataclass(frozen=True)
class Activation:
    """Forward maps `h_RG` to `a_RF`; backward maps (`da_RF`, `h_RG`) to `dh_RG`, and may overwrite `da_RF`.

    `forward` is differentiable by autograd as well, so that dense layers need no function of their own.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def make_activation(config: ModelConfig) -> Activation:
    """The activation that `model.activation` names."""
    if config.activation == "swigluoai":
        return _clamped_swiglu(config.swiglu_alpha, config.swiglu_limit)
    return _ACTIVATIONS[config.activation]


def _gated(gate_forward: Callable[[Tensor], Tensor], gate_backward: Any) -> Activation:
    """f(gate) * up, for the operator `gate_backward` of f, which has a variant that writes to `grad_input`."""

    def forward(h_RG: Tensor) -> Tensor:
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        a_RF = gate_forward(gate_RF)
        # In place only where autograd does not need the factor.
        return a_RF * up_RF if a_RF.requires_grad or up_RF.requires_grad else a_RF.mul_(up_RF)

    def backward(da_RF: Tensor, h_RG: Tensor) -> Tensor:
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        if torch.compiler.is_compiling():
            # The compiler fuses these, but does not write to parts of a tensor.
            return torch.cat((gate_backward(da_RF * up_RF, gate_RF), da_RF * gate_forward(gate_RF)), dim=-1)
        dh_RG = torch.empty_like(h_RG)
        dgate_RF, dup_RF = dh_RG.chunk(2, dim=-1)
        torch.mul(da_RF, gate_forward(gate_RF), out=dup_RF)
        gate_backward.grad_input(da_RF.mul_(up_RF), gate_RF, grad_input=dgate_RF)
        return dh_RG

    return Activation(forward, backward)


def _clamped_swiglu(alpha: float, limit: float) -> Activation:
    """gate * sigmoid(alpha * gate) * (up + 1), gate and up clamped (gpt-oss, OpenAI 2025)."""

    def forward(h_RG: Tensor) -> Tensor:
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        gate_RF, up_RF = gate_RF.clamp(max=limit), up_RF.clamp(-limit, limit)
        return gate_RF * torch.sigmoid(alpha * gate_RF) * (up_RF + 1)

    def backward(da_RF: Tensor, h_RG: Tensor) -> Tensor:
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        clamped_RF = gate_RF.clamp(max=limit)
        sigmoid_RF = torch.sigmoid(alpha * clamped_RF)
        slope_RF = sigmoid_RF * (1 + alpha * clamped_RF * (1 - sigmoid_RF))
        dgate_RF = da_RF * slope_RF * (up_RF.clamp(-limit, limit) + 1) * (gate_RF <= limit)
        dup_RF = da_RF * clamped_RF * sigmoid_RF * (up_RF.abs() <= limit)
        return torch.cat((dgate_RF, dup_RF), dim=-1)

    return Activation(forward, backward)


def _relu_backward(da_RF: Tensor, h_RF: Tensor) -> Tensor:
    return da_RF * (h_RF > 0)


def _relu2_backward(da_RF: Tensor, h_RF: Tensor) -> Tensor:
    return da_RF * F.relu(h_RF).mul_(2)


_ACTIVATIONS = {
    # Shazeer 2020
    "swiglu": _gated(F.silu, torch.ops.aten.silu_backward),
    "geglu": _gated(F.gelu, torch.ops.aten.gelu_backward),
    # Hendrycks and Gimpel 2016
    "gelu": Activation(F.gelu, torch.ops.aten.gelu_backward),
    "relu": Activation(F.relu, _relu_backward),
    # So et al. 2021 (Primer)
    "relu2": Activation(lambda h_RF: F.relu(h_RF).square(), _relu2_backward),
}
