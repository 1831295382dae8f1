"""All experts of a layer as one grouped matrix multiplication.

Shapes: R rows (routed tokens, grouped by expert), D model dim, F expert hidden dim, G = 2 * F where gated, else F,
e local experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.models.activations import Activation, make_activation
from moe_ray.models.grouped_mm import grouped_mm


class GroupedExperts(nn.Module):
    """Two-layer feed-forwards whose weights are stacked over the experts that this rank holds.

    Attributes:
        first_expert: global index of the first local expert; 0 unless experts are sharded.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.first_expert = 0
        self.activation = make_activation(config)
        num_experts, dim, hidden = config.num_experts, config.dim, config.expert_dim
        width = 2 * hidden if config.is_gated else hidden
        self.w_in_eGD = nn.Parameter(torch.empty(num_experts, width, dim))
        self.w_out_eDF = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.register_parameter("b_in_eG", None)
        self.register_parameter("b_out_eD", None)
        if config.expert_ffn_bias:
            self.b_in_eG = nn.Parameter(torch.empty(num_experts, width))
            self.b_out_eD = nn.Parameter(torch.empty(num_experts, dim))

    @property
    def num_local_experts(self) -> int:
        """Experts that this module holds (e)."""
        return self.w_in_eGD.shape[0]

    def forward(self, x_RD: Tensor, tokens_per_expert_e: Tensor, max_kept_rows: int | None = None) -> Tensor:
        """Apply expert i to its `tokens_per_expert_e[i]` consecutive rows; the counts sum to R.

        Args:
            max_kept_rows: rows whose hidden activations are kept for the backward pass, at least 1; those of the
                rest are computed twice, in chunks of at most as many rows. None: all are kept.

        Returns:
            Rows of shape [R, D] in the dtype of `x_RD`. Experts without rows get zero gradients.
        """
        weights = (self.w_in_eGD, self.w_out_eDF, self.b_in_eG, self.b_out_eD)
        return grouped_feed_forward(x_RD, tokens_per_expert_e, *weights, self.activation, max_kept_rows)


def grouped_feed_forward(
    x_RD: Tensor,
    tokens_per_expert_e: Tensor,
    w_in_eGD: Tensor,
    w_out_eDF: Tensor,
    b_in_eG: Tensor | None,
    b_out_eD: Tensor | None,
    activation: Activation,
    max_kept_rows: int | None = None,
) -> Tensor:
    """`GroupedExperts.forward` of these weights, in the dtype of `x_RD`."""
    ends_e = tokens_per_expert_e.cumsum(0).to(torch.int32)
    expert_R = None
    if b_in_eG is not None and b_out_eD is not None:
        experts_e = torch.arange(w_in_eGD.shape[0], device=x_RD.device)
        expert_R = experts_e.repeat_interleave(tokens_per_expert_e, output_size=x_RD.shape[0])
        b_in_eG, b_out_eD = b_in_eG.to(x_RD.dtype), b_out_eD.to(x_RD.dtype)
    weights = (w_in_eGD.to(x_RD.dtype), w_out_eDF.to(x_RD.dtype), b_in_eG, b_out_eD)
    if max_kept_rows is None or x_RD.shape[0] <= max_kept_rows:
        return _GroupedFeedForward.apply(x_RD, *weights, ends_e, expert_R, activation, True)
    return _in_chunks(x_RD, weights, ends_e, expert_R, activation, max_kept_rows)


def _in_chunks(
    x_RD: Tensor,
    weights: tuple[Tensor | None, ...],
    ends_e: Tensor,
    expert_R: Tensor | None,
    activation: Activation,
    size: int,
) -> Tensor:
    """`_GroupedFeedForward` of at most `size` rows at a time, of which only the last keeps its hidden rows."""
    # The last one is full: the backward pass meets it first, and frees it before it computes others again.
    remainder = x_RD.shape[0] % size
    sizes = [remainder] * (remainder > 0) + [size] * (x_RD.shape[0] // size)
    experts = [None] * len(sizes) if expert_R is None else expert_R.split(sizes)
    y_chunks, first = [], 0
    for chunk_RD, expert_chunk_R in zip(x_RD.split(sizes), experts, strict=True):
        rows = chunk_RD.shape[0]
        chunk_ends_e = (ends_e - first).clamp(0, rows)
        first += rows
        is_kept = first == x_RD.shape[0]
        y_chunks.append(
            _GroupedFeedForward.apply(chunk_RD, *weights, chunk_ends_e, expert_chunk_R, activation, is_kept)
        )
    return torch.cat(y_chunks)


class _GroupedFeedForward(torch.autograd.Function):
    """y = act(x W_in + b_in) W_out + b_out per group, keeping x and, if `is_kept`, the hidden rows twice over.

    Otherwise the backward pass computes the hidden rows and their activation again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        w_in_eGD: Tensor,
        w_out_eDF: Tensor,
        b_in_eG: Tensor | None,
        b_out_eD: Tensor | None,
        ends_e: Tensor,
        expert_R: Tensor | None,
        activation: Activation,
        is_kept: bool,
    ) -> Tensor:
        h_RG = _hidden(x_RD, w_in_eGD, b_in_eG, ends_e, expert_R)
        a_RF = activation.forward(h_RG)
        y_RD = grouped_mm(a_RF, w_out_eDF.transpose(-2, -1), ends_e)
        if b_out_eD is not None and expert_R is not None:
            y_RD += b_out_eD.index_select(0, expert_R)
        ctx.activation = activation
        hidden = (h_RG, a_RF) if is_kept else (None, None)
        ctx.save_for_backward(x_RD, w_in_eGD, w_out_eDF, b_in_eG, ends_e, expert_R, *hidden)
        return y_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, w_in_eGD, w_out_eDF, b_in_eG, ends_e, expert_R, h_RG, a_RF = ctx.saved_tensors
        if h_RG is None:
            h_RG = _hidden(x_RD, w_in_eGD, b_in_eG, ends_e, expert_R)
            a_RF = ctx.activation.forward(h_RG)
        dy_RD = grads[0].contiguous()
        num_experts = w_in_eGD.shape[0]
        da_RF = grouped_mm(dy_RD, w_out_eDF, ends_e)
        dw_out_eDF = grouped_mm(dy_RD.t(), a_RF, ends_e)
        dh_RG = ctx.activation.backward(da_RF, h_RG)
        dw_in_eGD = grouped_mm(dh_RG.t(), x_RD, ends_e)
        dx_RD = grouped_mm(dh_RG, w_in_eGD, ends_e)
        db_in_eG = db_out_eD = None
        if expert_R is not None:
            db_in_eG = _sum_by_expert(dh_RG, expert_R, num_experts)
            db_out_eD = _sum_by_expert(dy_RD, expert_R, num_experts)
        return dx_RD, dw_in_eGD, dw_out_eDF, db_in_eG, db_out_eD, None, None, None, None


def _hidden(
    x_RD: Tensor, w_in_eGD: Tensor, b_in_eG: Tensor | None, ends_e: Tensor, expert_R: Tensor | None
) -> Tensor:
    h_RG = grouped_mm(x_RD, w_in_eGD.transpose(-2, -1), ends_e)
    if b_in_eG is not None and expert_R is not None:
        h_RG += b_in_eG.index_select(0, expert_R)
    return h_RG


def _sum_by_expert(rows: Tensor, expert_R: Tensor, num_experts: int) -> Tensor:
    """In float32: bfloat16 stops growing after 256 rows."""
    sums = torch.zeros(num_experts, rows.shape[1], device=rows.device)
    return sums.index_add_(0, expert_R, rows.float()).to(rows.dtype)
