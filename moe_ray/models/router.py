"""Token-choice router: a softmax over experts, from which each token takes its top k.

Shapes: T tokens, D model dim, E experts, K experts a token.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    Attributes:
        logits_TE: router logits, float32.
        probs_TE: softmax of the logits over experts, float32.
        expert_ids_TK: chosen experts, best first, int64.
        weights_TK: weight of each chosen expert's output, float32.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor

    def tokens_per_expert(self) -> Tensor:
        """Tokens routed to each expert (`tokens_per_expert_E`, int64); sums to T * K."""
        return torch.bincount(self.expert_ids_TK.flatten(), minlength=self.logits_TE.shape[1])


class TopKRouter(nn.Module):
    """Softmax then top-k (Shazeer et al. 2017; Mixtral with `route_norm`), always computed in float32.

    A lower precision flips choices between nearly equal experts, so that training and serving would differ.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.route_norm = config.route_norm
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        # Share of routed pairs each expert received in the last optimizer step; see losses.load_balancing_loss.
        self.register_buffer("load_fraction_E", torch.empty(config.num_experts))

    load_fraction_E: Tensor

    def forward(self, x_TD: Tensor) -> Routing:
        """Route tokens of any float dtype."""
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), self.weight.float())
            probs_TE = logits_TE.softmax(dim=-1)
            weights_TK, expert_ids_TK = probs_TE.topk(self.top_k, dim=-1)
            if self.route_norm:
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        return Routing(logits_TE, probs_TE, expert_ids_TK, weights_TK)
