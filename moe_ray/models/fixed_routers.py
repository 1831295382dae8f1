"""Routers that learn nothing about whom to choose: baselines that tell routing quality from compute.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, K experts a token, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.models.router import Router, Routing
from moe_ray.models.seeding import seeded_generator


class HashRouter(Router):
    """Each token id has K fixed random experts of equal weight (Roller et al. 2021).

    Against it one sees what routing by content adds.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        table_VK = torch.empty(config.vocab_size, config.top_k, dtype=torch.int64)
        self.register_buffer("expert_ids_VK", table_VK)

    expert_ids_VK: Tensor

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        """Route by token id; the hidden states take no part."""
        expert_ids_TK = self.expert_ids_VK[tokens_BS.flatten()]
        share = 1 / self.config.top_k
        probs_TE = torch.zeros(len(expert_ids_TK), self.config.num_experts, device=x_BSD.device)
        probs_TE.scatter_(1, expert_ids_TK, share)
        weights_TK = torch.full_like(expert_ids_TK, share * self.config.route_scale, dtype=torch.float32)
        return Routing(None, probs_TE, expert_ids_TK, weights_TK)

    def init_state(self, key: str) -> None:
        """A random table, another one in each layer."""
        super().init_state(key)
        scores_VE = torch.rand(len(self.expert_ids_VK), self.config.num_experts, generator=seeded_generator(key))
        self.expert_ids_VK.copy_(scores_VE.topk(self.config.top_k, dim=1).indices)


class ForcedBalanceRouter(Router):
    """Experts in turn along each sequence, weighted by a router's scores: compute without imbalance."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        """Route by position; the weights are functions of the hidden states, so that all gradients exist."""
        config = self.config
        logits_TE = F.linear(x_BSD.flatten(0, 1), self.weight.float())
        probs_TE = logits_TE.softmax(dim=-1)
        batch, length = tokens_BS.shape
        pairs_SK = torch.arange(length * config.top_k, device=x_BSD.device).view(length, config.top_k)
        expert_ids_TK = (pairs_SK % config.num_experts).repeat(batch, 1)
        weights_TK = probs_TE.gather(1, expert_ids_TK)
        if config.route_norm:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(logits_TE, probs_TE, expert_ids_TK, weights_TK * config.route_scale)
