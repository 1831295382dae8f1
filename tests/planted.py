"""Routers whose experts are known to do something, or nothing, and a model and texts to try them on."""

import numpy as np
import torch
from torch import Tensor

from moe_ray.analytics.held_out import HeldOut
from moe_ray.config import ModelConfig
from moe_ray.models.router import Router, Routing
from moe_ray.models.transformer import Transformer, build_model

EXPERTS = 4
VOCAB = 64
LENGTH = 16


def to_expert(ids_T: Tensor) -> Routing:
    """The routing that sends each token to one expert, without logits."""
    probs_TE = torch.nn.functional.one_hot(ids_T, EXPERTS).float()
    return Routing(None, probs_TE, ids_T.unsqueeze(1), torch.ones(len(ids_T), 1))


class RangeRouter(Router):
    """The expert of a token is the quarter of the vocabulary that it is in."""

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        return to_expert(tokens_BS.flatten() * EXPERTS // VOCAB)


class RandomRouter(Router):
    """Experts are drawn from torch's generator."""

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        return to_expert(torch.randint(EXPERTS, (tokens_BS.numel(),)))


class RepeatRouter(Router):
    """Expert 2 gets the tokens that also stood three places earlier, expert 0 the others."""

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        is_repeat_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
        is_repeat_BS[:, 3:] = tokens_BS[:, 3:] == tokens_BS[:, :-3]
        return to_expert(torch.where(is_repeat_BS, 2, 0).flatten())


def planted_model(router: str, **changes: object) -> Transformer:
    """A model of two layers with a router of this module, or another one."""
    name = f"tests.planted:{router}" if router[0].isupper() else router
    settings = {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "num_experts": EXPERTS,
        "top_k": 1,
        "expert_dim": 16,
        "max_sequence_length": 64,
        "router": name,
    }
    return build_model(ModelConfig.model_validate(settings | changes), seed=0).eval()


def documents(
    generator: np.random.Generator, lengths: tuple[int, ...], low: int = 0, high: int = VOCAB
) -> HeldOut:
    """Three domains with as many documents each as there are lengths, of so many sequences of random ids."""
    units_N = np.repeat(np.arange(3 * len(lengths)), 3 * lengths)
    domains_N = units_N // len(lengths)
    tokens_NS = generator.integers(low, high, (len(units_N), LENGTH))
    return HeldOut(tokens_NS, ("a", "b", "c"), domains_N, units_N)
