"""Routing statistics of a step, from sums that can be added over micro-batches and ranks.

Shapes: L MoE layers, T tokens, E experts, X the columns of `RoutingSums`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ray.models.router import Routing

# An expert with more than this many times the mean load is overloaded.
OVERLOAD = 2.0
_SCALARS = 5


@dataclass(frozen=True)
class RoutingSums:
    """Sums over tokens, float64, so that counts stay exact when they are reduced with the rest.

    Attributes:
        sums_LX: for each layer the load_E (dropped tokens included), sum of probs_E, and of dropped pairs, of
            entropies, of squared log-sum-exp, of the largest and of the second largest probability.
    """

    sums_LX: Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device) -> "RoutingSums":
        """The sums of no tokens."""
        return cls(torch.zeros(num_layers, num_columns(num_experts), dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Add the tokens of a forward pass."""
        for sums_X, routing in zip(self.sums_LX, routings, strict=True):
            none = sums_X.new_zeros(())
            dropped = none if routing.num_dropped is None else routing.num_dropped
            z = none if routing.logits_TE is None else routing.logits_TE.logsumexp(dim=-1).square().sum()
            entropy = torch.special.entr(routing.probs_TE).sum()
            first_T, second_T = top_two(routing.probs_TE)
            scalars = torch.stack([x.double() for x in (dropped, entropy, z, first_T.sum(), second_T.sum())])
            sums_X += torch.cat((routing.load().double(), routing.probs_TE.sum(dim=0).double(), scalars))

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        """The sums of both."""
        return RoutingSums(self.sums_LX + other.sums_LX)

    @property
    def num_experts(self) -> int:
        """E."""
        return (self.sums_LX.shape[1] - _SCALARS) // 2

    @property
    def tokens_per_expert_LE(self) -> Tensor:
        """Tokens that chose each expert, dropped ones included."""
        return self.sums_LX[:, : self.num_experts]

    @property
    def load_fraction_LE(self) -> Tensor:
        """Share of the routed (token, expert) pairs that fell to each expert; rows sum to 1."""
        return self.tokens_per_expert_LE / self.tokens_per_expert_LE.sum(dim=1, keepdim=True).clamp(min=1)

    def by_layer(self, num_tokens: int) -> dict[str, Tensor]:
        """Statistics of each layer over the `num_tokens` tokens added, each of shape [L]."""
        dropped_L, entropy_L, z_L, first_L, second_L = self.sums_LX[:, -_SCALARS:].T
        loads_LE, pairs_L = self.load_fraction_LE, self.tokens_per_expert_LE.sum(dim=1).clamp(min=1)
        probs_LE = self.sums_LX[:, self.num_experts : 2 * self.num_experts] / num_tokens
        relative_LE = self.num_experts * loads_LE
        return {
            "load_balancing_loss": (relative_LE * probs_LE).sum(dim=1),
            "router_z_loss": z_L / num_tokens,
            "load_cv": load_cv(self.tokens_per_expert_LE),
            "load_variance": loads_LE.var(dim=1, correction=0),
            "load_max_over_mean": relative_LE.amax(dim=1),
            "routing_entropy": entropy_L / num_tokens / math.log(max(2, self.num_experts)),
            "router_confidence": first_L / num_tokens,
            "router_margin": (first_L - second_L) / num_tokens,
            "dead_experts": (relative_LE == 0).sum(dim=1),
            "overloaded_experts": (relative_LE > OVERLOAD).sum(dim=1),
            "dropped_fraction": dropped_L / pairs_L,
        }

    def metrics(self, num_tokens: int) -> dict[str, float | int | list[float]]:
        """The same as logged: one number over all layers, and lists by layer.

        Of the load it is that of the worst layer, `load_variance` being that of the load fractions; experts are
        counted over all layers; the rest are means over layers.
        """
        by_layer = self.by_layer(num_tokens)
        totals = {name: _over_layers(name, values_L) for name, values_L in by_layer.items()}
        lists = {f"{name}_by_layer": values_L.tolist() for name, values_L in by_layer.items()}
        return {**totals, **lists, "load_by_layer": self.load_fraction_LE.tolist()}


def _over_layers(name: str, values_L: Tensor) -> float | int:
    if name in ("load_cv", "load_variance", "load_max_over_mean"):
        return values_L.max().item()
    return int(values_L.sum()) if name.endswith("_experts") else values_L.mean().item()


def load_cv(tokens_per_expert_LE: Tensor) -> Tensor:
    """Coefficient of variation of the load over experts, by layer.

    0 is balanced, sqrt(E / K - 1) collapse: all tokens choose the same K experts.
    """
    return tokens_per_expert_LE.std(dim=1, correction=0) / tokens_per_expert_LE.mean(dim=1).clamp(min=1e-9)


def num_columns(num_experts: int) -> int:
    """Columns of `RoutingSums` (X)."""
    return 2 * num_experts + _SCALARS


def top_two(probs_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and second largest probability of each token; the second is 0 with one expert.

    A maximum twice, which is up to six times as fast on a CPU as `topk` over many experts.
    """
    first_T1, ids_T1 = probs_TE.max(dim=1, keepdim=True)
    return first_T1.squeeze(1), probs_TE.scatter(1, ids_T1, 0).amax(dim=1)
