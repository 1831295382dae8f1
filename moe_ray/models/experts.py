"""All experts of a layer as one grouped matrix multiplication.

Shapes: R rows (routed tokens, grouped by expert), D model dim, F expert hidden dim, G = 2 * F, e local experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.config import ModelConfig


class GroupedExperts(nn.Module):
    """SwiGLU experts (Shazeer 2020) whose weights are stacked over the experts that this rank holds.

    Attributes:
        first_expert: global index of the first local expert; 0 unless experts are sharded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first_expert = 0
        self.w_gate_up_eGD = nn.Parameter(torch.empty(config.num_experts, 2 * config.expert_dim, config.dim))
        self.w_down_eDF = nn.Parameter(torch.empty(config.num_experts, config.dim, config.expert_dim))

    @property
    def num_local_experts(self) -> int:
        """Experts that this module holds (e)."""
        return self.w_gate_up_eGD.shape[0]

    def forward(self, x_RD: Tensor, tokens_per_expert_e: Tensor) -> Tensor:
        """Apply expert i to its `tokens_per_expert_e[i]` consecutive rows; the counts sum to R.

        Returns:
            Rows of shape [R, D] in the dtype of `x_RD`. Experts without rows get zero gradients.
        """
        ends_e = tokens_per_expert_e.cumsum(0).to(torch.int32)
        w_gate_up_eGD = self.w_gate_up_eGD.to(x_RD.dtype)
        w_down_eDF = self.w_down_eDF.to(x_RD.dtype)
        return _GroupedSwiGLU.apply(x_RD, w_gate_up_eGD, w_down_eDF, ends_e)


class _GroupedSwiGLU(torch.autograd.Function):
    """y = (silu(x Wg) * (x Wu)) Wd per group, with a backward that writes both halves of G in place."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, w_gate_up_eGD: Tensor, w_down_eDF: Tensor, ends_e: Tensor) -> Tensor:
        h_RG = F.grouped_mm(x_RD, w_gate_up_eGD.transpose(-2, -1), offs=ends_e)
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        a_RF = F.silu(gate_RF).mul_(up_RF)
        ctx.save_for_backward(x_RD, w_gate_up_eGD, w_down_eDF, ends_e, h_RG, a_RF)
        return F.grouped_mm(a_RF, w_down_eDF.transpose(-2, -1), offs=ends_e)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_RD, w_gate_up_eGD, w_down_eDF, ends_e, h_RG, a_RF = ctx.saved_tensors
        dy_RD = grads[0].contiguous()
        gate_RF, up_RF = h_RG.chunk(2, dim=-1)
        da_RF = F.grouped_mm(dy_RD, w_down_eDF, offs=ends_e)
        dw_down_eDF = F.grouped_mm(dy_RD.t(), a_RF, offs=ends_e)
        dh_RG = torch.empty_like(h_RG)
        dgate_RF, dup_RF = dh_RG.chunk(2, dim=-1)
        torch.mul(da_RF, F.silu(gate_RF), out=dup_RF)
        torch.ops.aten.silu_backward.grad_input(da_RF.mul_(up_RF), gate_RF, grad_input=dgate_RF)
        dw_gate_up_eGD = F.grouped_mm(dh_RG.t(), x_RD, offs=ends_e)
        dx_RD = F.grouped_mm(dh_RG, w_gate_up_eGD, offs=ends_e)
        return dx_RD, dw_gate_up_eGD, dw_down_eDF, None
