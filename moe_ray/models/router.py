"""What every router is and returns.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, K experts a token.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_ray.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """What a router decided for T tokens.

    Attributes:
        logits_TE: router logits, float32; None if the router has none.
        probs_TE: scores over experts that sum to 1 for each token, float32.
        expert_ids_TK: chosen experts, best first, int64; E where a token has fewer than K.
        weights_TK: weight of each chosen expert's output, float32; 0 where there is none.
        kept_TK: whether the pair reaches its expert, bool; None if all do.
        num_dropped: routed pairs that an expert had no room for, int64 scalar; None if none can be.
    """

    logits_TE: Tensor | None
    probs_TE: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None = None
    num_dropped: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs_TE.shape[1]

    def load(self) -> Tensor:
        """Tokens that chose each expert, dropped ones included, int64 of shape [E]."""
        return _count(self.expert_ids_TK, self.num_experts)

    def tokens_per_expert(self) -> Tensor:
        """Tokens that reach each expert (`tokens_per_expert_E`, int64)."""
        if self.kept_TK is None:
            return self.load()
        return _count(self.expert_ids_TK.masked_fill(~self.kept_TK, self.num_experts), self.num_experts)


def _count(ids: Tensor, num_experts: int) -> Tensor:
    """Occurrences of 0 to num_experts - 1; `bincount` would wait for a GPU."""
    ids = ids.flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids, torch.ones_like(ids))[:num_experts]


class Router(nn.Module):
    """Base of all routers. A user's own is a subclass, named by `model.router: module:Class`.

    It is built with the model's settings, registers its parameters, and maps hidden states to a `Routing`.
    Parameters of two dims are initialised like all matrices of the model, those of one dim with zeros.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Share of routed pairs each expert received in the last optimizer step; see losses.load_balancing_loss.
        self.register_buffer("load_fraction_E", torch.empty(config.num_experts))

    load_fraction_E: Tensor

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        """Route T = B * S tokens.

        Args:
            x_BSD: normalised hidden states, of any float dtype; B may be 0.
            tokens_BS: token ids, int64.
        """
        raise NotImplementedError

    def init_buffers(self, key: str) -> None:
        """Set the buffers; random ones from `seeded_generator(key)`, so that all ranks agree."""
        self.load_fraction_E.fill_(1 / self.load_fraction_E.numel())


def seeded_generator(key: str) -> torch.Generator:
    """A generator whose stream is a function of a text."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
