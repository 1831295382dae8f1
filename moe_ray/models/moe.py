"""The MoE feed-forward layer: route, dispatch, expert compute, combine.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, e local experts, K top-k, R rows at experts.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.permute import Permutation, group_by_expert, pad_groups, permute, unpermute
from moe_ray.models.router import Routing, TopKRouter


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived at the local experts.

    Attributes:
        x_RD: rows grouped by local expert.
        tokens_per_expert_e: rows of each local expert, padding included, int64.
        plan: what `combine` of the same dispatcher needs to send the rows back.
    """

    x_RD: Tensor
    tokens_per_expert_e: Tensor
    plan: Any


class Dispatcher(Protocol):
    """Brings tokens to their experts and the results back; differentiable in both directions."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Send each token to its K experts."""
        ...

    def combine(self, y_RD: Tensor, routing: Routing, plan: Any) -> Tensor:
        """Return the rows to their tokens and sum them with the routing weights: `y_TD`."""
        ...


class LocalDispatcher:
    """Every expert is on this device: dispatch is a permutation."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Group the tokens by expert."""
        permutation, tokens_per_expert_e = pad_groups(
            group_by_expert(routing.expert_ids_TK), routing.tokens_per_expert(), x_TD
        )
        return Dispatched(permute(x_TD, permutation), tokens_per_expert_e, permutation)

    def combine(self, y_RD: Tensor, routing: Routing, plan: Permutation) -> Tensor:
        """Undo the grouping and sum over each token's experts."""
        return unpermute(y_RD, routing.weights_TK, plan)


class MoE(nn.Module):
    """Dropless Mixture-of-Experts feed-forward.

    Attributes:
        dispatcher: replaced from outside when the experts are sharded over ranks.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.router = TopKRouter(config)
        self.experts = GroupedExperts(config)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        """Returns the output, shaped as the input, and the routing of its T = B * S tokens."""
        x_TD = x_BSD.flatten(0, 1)
        routing = self.router(x_TD)
        if torch.is_autocast_enabled(x_TD.device.type):
            # Before dispatch, so that half as many bytes move; grouped_mm does not know of autocast.
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        dispatched = self.dispatcher.dispatch(x_TD, routing)
        y_RD = self.experts(dispatched.x_RD, dispatched.tokens_per_expert_e)
        y_TD = self.dispatcher.combine(y_RD, routing, dispatched.plan)
        return y_TD.view_as(x_BSD), routing
