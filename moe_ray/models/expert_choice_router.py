"""Expert choice: each expert takes the tokens with the best scores.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, C tokens an expert takes, K most experts that
a token got.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.models.router import Router, Routing


class ExpertChoiceRouter(Router):
    """Every expert takes top_k * S / E tokens of each sequence (Zhou et al. 2022), so the load is always balanced.

    Not causal: whether a token gets an expert depends on tokens that follow it. Trained on next tokens, such a
    model has seen a little of the future, and generating one token at a time it routes otherwise than it learnt;
    `moe_ray.serving` refuses it unless asked. A token may get no expert, or all.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        """Route by content, each sequence for itself."""
        config, num_experts = self.config, self.config.num_experts
        batch, length = tokens_BS.shape
        capacity = min(length, math.ceil(config.top_k * length / num_experts))
        logits_TE = F.linear(x_BSD.flatten(0, 1), self.weight.float())
        probs_TE = logits_TE.softmax(dim=-1)
        probs_BSE = probs_TE.detach().view(batch, length, num_experts)
        taken_BCE = probs_BSE.topk(capacity, dim=1).indices
        chosen_TE = torch.zeros_like(probs_BSE, dtype=torch.bool).scatter_(1, taken_BCE, True).flatten(0, 1)
        most = int(chosen_TE.sum(dim=1).max()) if len(chosen_TE) else 0
        # Chosen experts first, by score; the others fill the table and are marked as absent.
        rank_TE = probs_TE.detach().masked_fill(~chosen_TE, -1)
        expert_ids_TK = rank_TE.topk(max(1, most), dim=-1).indices
        kept_TK = chosen_TE.gather(1, expert_ids_TK)
        weights_TK = probs_TE.gather(1, expert_ids_TK) * kept_TK
        if config.route_norm:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(
            logits_TE,
            probs_TE,
            expert_ids_TK.masked_fill(~kept_TK, num_experts),
            weights_TK * config.route_scale,
            kept_TK,
            num_dropped=(~kept_TK[:, 0]).sum() * config.top_k,
        )
