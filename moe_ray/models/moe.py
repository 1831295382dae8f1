"""The MoE feed-forward layer: route, dispatch, expert compute, combine.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, e local experts, K top-k, R rows at experts.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError
from moe_ray.models.capacity import expert_capacity, limit_capacity
from moe_ray.models.expert_choice_router import ExpertChoiceRouter
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.feed_forward import FeedForward
from moe_ray.models.fixed_routers import ForcedBalanceRouter, HashRouter
from moe_ray.models.permute import Permutation, group_by_expert, pad_groups, permute, unpermute
from moe_ray.models.router import Router, Routing, check_routing
from moe_ray.models.top_k_router import TopKRouter

_ROUTERS: dict[str, type[Router]] = {
    "top_k": TopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "forced_balance": ForcedBalanceRouter,
}


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived at the local experts.

    Attributes:
        x_RD: rows grouped by local expert.
        tokens_per_expert_e: rows of each local expert, padding included, int64.
        plan: what `combine` of the same dispatcher needs to send the rows back.
        max_kept_rows: rows whose hidden activations the experts may keep; None: all.
    """

    x_RD: Tensor
    tokens_per_expert_e: Tensor
    plan: Any
    max_kept_rows: int | None = None


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
            group_by_expert(routing.expert_ids_TK, routing.kept_TK), routing.tokens_per_expert(), x_TD
        )
        return Dispatched(permute(x_TD, permutation), tokens_per_expert_e, permutation)

    def combine(self, y_RD: Tensor, routing: Routing, plan: Permutation) -> Tensor:
        """Undo the grouping and sum over each token's experts."""
        return unpermute(y_RD, routing.weights_TK, plan)


class MoE(nn.Module):
    """Mixture-of-Experts feed-forward, dropless unless the settings bound an expert's capacity.

    Attributes:
        dispatcher: replaced from outside when the experts are sharded over ranks.
        shared: experts that every token uses, as one feed-forward (Dai et al. 2024); None if there are none.
        shared_gate: scales their output by a sigmoid of the input (Qwen2-MoE); None if it is not scaled.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.router = make_router(config)
        self.experts = GroupedExperts(config)
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.shared = self.shared_gate = None
        if config.num_shared_experts:
            self.shared = FeedForward(config, config.num_shared_experts * config.expert_dim)
        if config.shared_expert_gate:
            self.shared_gate = nn.Linear(config.dim, 1, bias=False)

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor, dropless: bool = False) -> tuple[Tensor, Routing]:
        """Returns the output, shaped as the input, and the routing of its T = B * S tokens.

        Args:
            x_BSD: normalised hidden states.
            tokens_BS: the ids of the tokens, for routers that look at them.
            dropless: whether to ignore the capacity, as generation does: a token that comes alone has no
                sequence that its expert could be full of.
        """
        with torch.autocast(x_BSD.device.type, enabled=False):
            routing = self.router(x_BSD.float(), tokens_BS)
        if self.config.router not in _ROUTERS:
            check_routing(routing, self.config.router, tokens_BS.numel(), self.config.num_experts)
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor is not None and not dropless:
            batch, length = tokens_BS.shape
            capacity = expert_capacity(factor, length, self.config.top_k, self.config.num_experts)
            routing = limit_capacity(routing, batch, capacity)
        x_TD = x_BSD.flatten(0, 1)
        if torch.is_autocast_enabled(x_TD.device.type):
            # Before dispatch, so that half as many bytes move; grouped_mm does not know of autocast.
            x_TD = x_TD.to(torch.get_autocast_dtype(x_TD.device.type))
        dispatched = self.dispatcher.dispatch(x_TD, routing)
        y_RD = self.experts(dispatched.x_RD, dispatched.tokens_per_expert_e, dispatched.max_kept_rows)
        y_TD = self.dispatcher.combine(y_RD, routing, dispatched.plan)
        if self.shared is not None:
            y_TD = y_TD + self._shared(x_TD)
        return y_TD.view_as(x_BSD), routing

    def _shared(self, x_TD: Tensor) -> Tensor:
        assert self.shared is not None
        y_TD = self.shared(x_TD)
        return y_TD if self.shared_gate is None else y_TD * self.shared_gate(x_TD).sigmoid()


def make_router(config: ModelConfig) -> Router:
    """The router that `model.router` names.

    Raises:
        ConfigError: it names a class that cannot be imported or is no `Router`.
    """
    if config.router in _ROUTERS:
        return _ROUTERS[config.router](config)
    module_name, _, class_name = config.router.partition(":")
    try:
        router = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.router={config.router!r} cannot be imported: {error}.",
            "put the module where Python finds it, such as the working directory of the job.",
        ) from None
    if not (isinstance(router, type) and issubclass(router, Router)):
        raise ConfigError(
            f"model.router={config.router!r} is no subclass of moe_ray.models.router.Router.",
            "derive the class from it.",
        )
    if config.expert_bias and not issubclass(router, TopKRouter):
        raise ConfigError(
            f"model.expert_bias=True has no meaning with model.router={config.router!r}, which has no such bias.",
            "leave it out, or derive the class from moe_ray.models.top_k_router.TopKRouter.",
        )
    built = router(config)
    if not hasattr(built, "load_fraction_E"):
        raise ConfigError(
            f"model.router={config.router!r} does not call the constructor of its base.",
            "begin its own with super().__init__(config).",
        )
    return built
