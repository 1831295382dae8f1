"""Routing statistics of a step, from sums that can be added over micro-batches and ranks.

Shapes: L MoE layers, T tokens, E experts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ray.models.router import Routing


@dataclass(frozen=True)
class RoutingSums:
    """Sums over tokens, float64, so that counts stay exact when they are reduced with the rest.

    Attributes:
        sums_LX: for each layer the load_E (dropped tokens included), sum of probs_E, dropped pairs, sum of
            entropies, sum of squared log-sum-exp.
    """

    sums_LX: Tensor

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int, device: torch.device) -> "RoutingSums":
        """The sums of no tokens."""
        return cls(torch.zeros(num_layers, 2 * num_experts + 3, dtype=torch.float64, device=device))

    @torch.no_grad()
    def add(self, routings: Sequence[Routing]) -> None:
        """Add the tokens of a forward pass."""
        for sums_X, routing in zip(self.sums_LX, routings, strict=True):
            none = sums_X.new_zeros(())
            dropped = none if routing.num_dropped is None else routing.num_dropped
            z = none if routing.logits_TE is None else routing.logits_TE.logsumexp(dim=-1).square().sum()
            entropy = torch.special.entr(routing.probs_TE).sum()
            scalars = torch.stack((dropped.double(), entropy.double(), z.double()))
            sums_X += torch.cat((routing.load().double(), routing.probs_TE.sum(dim=0).double(), scalars))

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        """The sums of both."""
        return RoutingSums(self.sums_LX + other.sums_LX)

    @property
    def num_experts(self) -> int:
        """E."""
        return (self.sums_LX.shape[1] - 3) // 2

    @property
    def tokens_per_expert_LE(self) -> Tensor:
        """Tokens that chose each expert, dropped ones included."""
        return self.sums_LX[:, : self.num_experts]

    @property
    def load_fraction_LE(self) -> Tensor:
        """Share of the routed (token, expert) pairs that fell to each expert; rows sum to 1."""
        return self.tokens_per_expert_LE / self.tokens_per_expert_LE.sum(dim=1, keepdim=True).clamp(min=1)

    def metrics(self, num_tokens: int) -> dict[str, float | int | list[float]]:
        """Statistics over the `num_tokens` tokens added: one number over all layers, and lists by layer.

        `load_cv` and `load_variance` are those of the worst layer; the variance is that of the load fractions.
        """
        loads_LE = self.load_fraction_LE
        probs_LE = self.sums_LX[:, self.num_experts : 2 * self.num_experts] / num_tokens
        cv_L = load_cv(self.tokens_per_expert_LE)
        variance_L = loads_LE.var(dim=1, correction=0)
        entropy_L = self.sums_LX[:, -2] / num_tokens / math.log(max(2, self.num_experts))
        dead_L = (self.tokens_per_expert_LE == 0).sum(dim=1)
        balance_L = self.num_experts * (loads_LE * probs_LE).sum(dim=1)
        return {
            "load_balancing_loss": balance_L.mean().item(),
            "router_z_loss": self.sums_LX[:, -1].mean().item() / num_tokens,
            "load_cv": cv_L.max().item(),
            "load_variance": variance_L.max().item(),
            "routing_entropy": entropy_L.mean().item(),
            "dead_experts": int(dead_L.sum()),
            "dropped_fraction": (self.sums_LX[:, -3].sum() / self.tokens_per_expert_LE.sum().clamp(min=1)).item(),
            "load_cv_by_layer": cv_L.tolist(),
            "load_variance_by_layer": variance_L.tolist(),
            "routing_entropy_by_layer": entropy_L.tolist(),
            "dead_experts_by_layer": dead_L.tolist(),
            "load_by_layer": loads_LE.tolist(),
        }


def load_cv(tokens_per_expert_LE: Tensor) -> Tensor:
    """Coefficient of variation of the load over experts, by layer: 0 is balanced, sqrt(E - 1) is collapse."""
    return tokens_per_expert_LE.std(dim=1, correction=0) / tokens_per_expert_LE.mean(dim=1).clamp(min=1e-9)
