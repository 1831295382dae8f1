"""Gather tokens by expert and scatter them back, each with a backward that never materialises T*K rows twice.

`embedding_bag` sums the K rows of a token while reading them, several times faster on a CPU than the
`index_put`/`index_add` that autograd would use.

Shapes: T tokens, K experts a token, N = T * K routed tokens (with padding, where groups are padded), D model dim,
E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP_MULTIPLE = 16


@dataclass(frozen=True)
class Permutation:
    """The order in which N routed tokens are laid out, grouped by expert.

    Attributes:
        order_N: flat (token, k) index of each row, int64; -1 in rows that only pad a group.
        inverse_TK: row of each (token, k) pair, int64; 0 for pairs that have none.
        kept_TK: whether a pair has a row, bool; None if all have.
    """

    order_N: Tensor
    inverse_TK: Tensor
    kept_TK: Tensor | None = None


def group_by_expert(expert_ids_TK: Tensor, kept_TK: Tensor | None = None) -> Permutation:
    """The permutation that lists routed tokens expert by expert, tokens of an expert in their order.

    Args:
        kept_TK: pairs that get a row; default all. Counting them makes the host wait for a GPU.
    """
    ids_N, num_rows = expert_ids_TK.flatten(), expert_ids_TK.numel()
    if kept_TK is not None:
        ids_N = ids_N.masked_fill(~kept_TK.flatten(), torch.iinfo(torch.int64).max)
        num_rows = int(kept_TK.sum())
    order_N = torch.argsort(ids_N, stable=True)[:num_rows]
    inverse_N = torch.zeros_like(ids_N)
    inverse_N[order_N] = torch.arange(num_rows, device=order_N.device)
    return Permutation(order_N, inverse_N.view_as(expert_ids_TK), kept_TK)


def pad_groups(permutation: Permutation, tokens_per_expert_E: Tensor, x_TD: Tensor) -> tuple[Permutation, Tensor]:
    """Lengthen groups to a multiple of 16 rows where that pays, which is for bfloat16 on CPUs.

    oneDNN compiles a kernel for each number of rows that it meets, which takes as long as using it, and keeps
    1024 of them: counts that change with every batch would have it compile for ever.

    Returns:
        The permutation with padding, and the lengths of the groups. Rows that pad hold a copy of some token;
        their outputs are ignored and they receive zero gradients.
    """
    num_rows, num_experts = permutation.order_N.numel(), tokens_per_expert_E.numel()
    is_slow = x_TD.device.type == "cpu" and x_TD.dtype == torch.bfloat16
    # A compiled model cannot have shapes that depend on counts.
    if not is_slow or num_rows < _GROUP_MULTIPLE * num_experts or torch.compiler.is_compiling():
        return permutation, tokens_per_expert_E
    padding_E = -tokens_per_expert_E % _GROUP_MULTIPLE
    shift_E = padding_E.cumsum(0) - padding_E
    rows_N = torch.arange(num_rows) + shift_E.repeat_interleave(tokens_per_expert_E)
    order_N = torch.full((num_rows + int(padding_E.sum()),), -1)
    order_N[rows_N] = permutation.order_N
    padded = Permutation(order_N, rows_N[permutation.inverse_TK], permutation.kept_TK)
    return padded, tokens_per_expert_E + padding_E


def permute(x_TD: Tensor, permutation: Permutation) -> Tensor:
    """Rows of `x_TD`, each repeated for its K experts, in the permutation's order: `x_ND`."""
    return _Permute.apply(x_TD, permutation.order_N, permutation.inverse_TK, permutation.kept_TK)


def unpermute(y_ND: Tensor, weights_TK: Tensor, permutation: Permutation) -> Tensor:
    """Weighted sum of each token's K rows: `y_TD`, in the dtype of `y_ND`. Pairs without a row must weigh 0."""
    return _Unpermute.apply(y_ND, weights_TK.to(y_ND.dtype), permutation.order_N, permutation.inverse_TK)


def _sum_rows(rows_ND: Tensor, index_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    if index_TK.numel() == 0 or rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(index_TK.shape[0], rows_ND.shape[1])
    return F.embedding_bag(index_TK, rows_ND, mode="sum", per_sample_weights=weights_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_TK: Tensor, kept_TK: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse_TK, kept_TK)
        return x_TD.index_select(0, order_N.clamp(min=0) // inverse_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        inverse_TK, kept_TK = ctx.saved_tensors
        grad_ND = grads[0].contiguous()
        mask_TK = None if kept_TK is None else kept_TK.to(grad_ND.dtype)
        return _sum_rows(grad_ND, inverse_TK, mask_TK), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, weights_TK: Tensor, order_N: Tensor, inverse_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, weights_TK, order_N, inverse_TK)
        return _sum_rows(y_ND, inverse_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        y_ND, weights_TK, order_N, inverse_TK = ctx.saved_tensors
        pair_N = order_N.clamp(min=0)
        grad_ND = grads[0].index_select(0, pair_N // inverse_TK.shape[1])
        grad_weights_TK = None
        if ctx.needs_input_grad[1]:
            products_N = (grad_ND * y_ND).sum(dim=-1)
            grad_weights_TK = products_N[inverse_TK] if products_N.numel() else torch.zeros_like(weights_TK)
        weights_N = weights_TK.flatten().index_select(0, pair_N).masked_fill_(order_N < 0, 0)
        grad_ND *= weights_N.unsqueeze(-1)
        return grad_ND, grad_weights_TK, None, None
