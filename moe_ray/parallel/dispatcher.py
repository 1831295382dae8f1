"""Dispatch and combine by all-to-all over the `ep` group, with uneven and empty splits.

Shapes: T local tokens, K top-k, N = T * K routed tokens, D model dim, E experts, p ranks of the group,
e local experts, R rows received for the local experts.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ray.models.moe import Dispatched
from moe_ray.models.permute import Permutation, group_by_expert, permute, unpermute
from moe_ray.models.router import Routing
from moe_ray.telemetry.clock import PhaseClock


@dataclass(frozen=True)
class AllToAllPlan:
    """How rows went out, so that they can come back.

    Attributes:
        by_expert: order of the N sent rows, grouped by global expert and so by destination rank.
        by_local_expert: order of the R received rows, regrouped from source rank to local expert.
        sent: rows sent to each rank of the group.
        received: rows received from each.
    """

    by_expert: Permutation
    by_local_expert: Permutation
    sent: list[int]
    received: list[int]


class AllToAllDispatcher:
    """Rank r of the group holds experts [r * e, (r + 1) * e). Every rank must call in the same order.

    Args:
        buffer_factor: rows whose hidden activations this rank's experts keep, over the balanced share; None: all.
    """

    def __init__(self, group: dist.ProcessGroup, clock: PhaseClock, buffer_factor: float | None = None) -> None:
        self._group = group
        self._clock = clock
        self._buffer_factor = buffer_factor

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Send each token to the ranks of its K experts."""
        by_expert = group_by_expert(routing.expert_ids_TK, routing.kept_TK)
        sent_pe = routing.tokens_per_expert().view(self._group.size(), -1)
        received_pe = torch.empty_like(sent_pe)
        with self._clock.phase("dispatch"):
            dist.all_to_all_single(received_pe, sent_pe, group=self._group)
            # The one point where the host waits for the device.
            sent, received = torch.stack((sent_pe.sum(1), received_pe.sum(1))).tolist()
        local_expert_ids_R = torch.arange(sent_pe.shape[1], device=x_TD.device).repeat(self._group.size())
        local_expert_ids_R = local_expert_ids_R.repeat_interleave(received_pe.flatten(), output_size=sum(received))
        plan = AllToAllPlan(by_expert, group_by_expert(local_expert_ids_R.unsqueeze(1)), sent, received)
        rows_RD = self._exchange(permute(x_TD, by_expert), sent, received)
        max_kept_rows = self._max_kept_rows(sum(sent), sum(received))
        return Dispatched(permute(rows_RD, plan.by_local_expert), received_pe.sum(0), plan, max_kept_rows)

    def combine(self, y_RD: Tensor, routing: Routing, plan: AllToAllPlan) -> Tensor:
        """Send the rows back and sum over each token's experts."""
        order, inverse = plan.by_local_expert.order_N, plan.by_local_expert.inverse_TK
        by_source = Permutation(inverse.flatten(), order.view_as(inverse))
        y_ND = self._exchange(permute(y_RD, by_source), plan.received, plan.sent)
        return unpermute(y_ND, routing.weights_TK, plan.by_expert)

    def _max_kept_rows(self, num_sent: int, num_received: int) -> int | None:
        """Decided without a message: ranks have about equally many tokens, so each sends a balanced share.

        A rank with fewer tokens than its peers takes what one of p equal ranks would have sent it. Neither is
        more than the largest rank sends.
        """
        if self._buffer_factor is None:
            return None
        return math.ceil(self._buffer_factor * max(num_sent, num_received / self._group.size()))

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        return _AllToAll.apply(rows, sent, received, self._group, self._clock)


class _AllToAll(torch.autograd.Function):
    """Exchange rows; the gradient takes the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, clock: PhaseClock
    ) -> Tensor:
        ctx.route = (received, sent, group, clock)
        return _all_to_all(rows, sent, received, group, clock)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _all_to_all(grads[0], *ctx.route), None, None, None, None


def _all_to_all(
    rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup, clock: PhaseClock
) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    with clock.phase("dispatch"):
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
