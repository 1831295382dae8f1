"""Token choice: each token takes the k experts with the best scores.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, K experts a token, g groups of experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.models.router import Router, Routing


class TopKRouter(Router):
    """Top-k of softmax or sigmoid scores.

    By setting:
        `route_norm`: weights of the chosen rescaled to sum 1 (Mixtral, Jiang et al. 2024).
        `softmax_after_top_k`: softmax over the chosen logits (gpt-oss).
        `router_jitter`: in training, inputs times uniform noise in 1 ± jitter (Fedus et al. 2021, 2.4).
        `noisy_top_k`: in training, normal noise of a learned size on the logits (Shazeer et al. 2017, eq. 4).
        `score_func: sigmoid`, `expert_bias`: scores for choosing are raised by a bias, weights are not
            (Wang et al. 2024; DeepSeek-AI 2024, eq. 16); `update_expert_bias` moves it.
        `num_expert_groups`, `num_limited_groups`: only experts of the best groups, by the sum of each group's
            best two scores, can be chosen (DeepSeek-AI 2024, 2.1.2).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        self.register_parameter("bias", None)
        self.register_parameter("noise_weight", None)
        self.register_buffer("expert_bias_E", torch.empty(config.num_experts) if config.expert_bias else None)
        if config.router_bias:
            self.bias = nn.Parameter(torch.empty(config.num_experts))
        if config.noisy_top_k:
            self.noise_weight = nn.Parameter(torch.empty(config.num_experts, config.dim))

    expert_bias_E: Tensor | None

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        """Route by content; the token ids take no part."""
        config = self.config
        logits_TE = self._logits(x_BSD.flatten(0, 1))
        if config.score_func == "sigmoid":
            scores_TE = logits_TE.sigmoid()
            probs_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
        else:
            scores_TE = probs_TE = logits_TE.softmax(dim=-1)
        expert_ids_TK = self._choose(scores_TE)
        if config.softmax_after_top_k:
            weights_TK = logits_TE.gather(1, expert_ids_TK).softmax(dim=-1)
        else:
            weights_TK = scores_TE.gather(1, expert_ids_TK)
        if config.route_norm:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        if config.route_scale != 1:
            weights_TK = weights_TK * config.route_scale
        return Routing(logits_TE, probs_TE, expert_ids_TK, weights_TK)

    def init_state(self, key: str) -> None:
        """All experts alike."""
        super().init_state(key)
        if self.expert_bias_E is not None:
            self.expert_bias_E.zero_()

    @torch.no_grad()
    def update_expert_bias(self, load_fraction_E: Tensor) -> None:
        """Raise the bias of experts below the mean load of a step by the update rate, lower that of the others."""
        if self.expert_bias_E is not None:
            missing_E = 1 - load_fraction_E * load_fraction_E.numel()
            # An expert with the mean load stays where it is, although 1 / E is rounded.
            direction_E = missing_E.sign() * (missing_E.abs() > 1e-5)
            self.expert_bias_E += self.config.expert_bias_update_rate * direction_E

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.training and self.config.router_jitter:
            jitter = self.config.router_jitter
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)
        bias_E = None if self.bias is None else self.bias.float()
        logits_TE = F.linear(x_TD, self.weight.float(), bias_E)
        if self.training and self.noise_weight is not None:
            scale_TE = F.softplus(F.linear(x_TD, self.noise_weight.float()))
            logits_TE = logits_TE + torch.randn_like(logits_TE) * scale_TE
        return logits_TE

    def _choose(self, scores_TE: Tensor) -> Tensor:
        scores_TE = scores_TE.detach()
        if self.expert_bias_E is not None:
            scores_TE = scores_TE + self.expert_bias_E
        if self.config.num_expert_groups > 1:
            scores_TE = self._only_best_groups(scores_TE)
        return scores_TE.topk(self.config.top_k, dim=-1).indices

    def _only_best_groups(self, scores_TE: Tensor) -> Tensor:
        scores_Tge = scores_TE.unflatten(1, (self.config.num_expert_groups, -1))
        best_two = scores_Tge.topk(min(2, scores_Tge.shape[2]), dim=-1).values
        best_groups = best_two.sum(dim=-1).topk(self.config.num_limited_groups, dim=-1).indices
        excluded_Tg = torch.ones_like(scores_Tge[:, :, 0], dtype=torch.bool).scatter_(1, best_groups, False)
        return scores_Tge.masked_fill(excluded_Tg.unsqueeze(-1), float("-inf")).flatten(1)
