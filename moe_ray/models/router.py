"""What every router is and returns.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, K experts a token.
"""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError


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

    It is built with the model's settings, registers its parameters, and maps hidden states to a `Routing`. It
    runs in float32 whatever the type of the model: a lower precision flips choices between nearly equal experts,
    so that training and serving would differ. A token must be routed by what it is itself, for in generation the
    tokens of a pass belong to different sequences.

    Built without memory, it gets its values afterwards: matrices like all of the model, norms ones, other vectors
    and scalars zeros, buffers what `init_state` sets.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # Share of routed pairs each expert received in the last optimizer step; see losses.load_balancing_loss.
        self.register_buffer("load_fraction_E", torch.empty(config.num_experts))

    load_fraction_E: Tensor

    def forward(self, x_BSD: Tensor, tokens_BS: Tensor) -> Routing:
        """Route T = B * S tokens.

        Args:
            x_BSD: normalised hidden states, float32; B may be 0.
            tokens_BS: token ids, int64.
        """
        raise NotImplementedError

    def init_state(self, key: str) -> None:
        """Set all buffers, and parameters that should start otherwise.

        Random ones come from `seeded_generator(key)`, so that all ranks agree.
        """
        self.load_fraction_E.fill_(1 / self.load_fraction_E.numel())


def check_routing(routing: Routing, router: str, num_tokens: int, num_experts: int) -> None:
    """Whether what a user's own router returned can be dispatched.

    Raises:
        ConfigError: it has a wrong shape or type, experts that do not exist, or numbers that cannot be.
    """

    def fail(problem: str) -> NoReturn:
        raise ConfigError(
            f"model.router={router!r} returned {problem}.", "see docs/routers.md for what it must return."
        )

    if not isinstance(routing, Routing):
        fail(f"{type(routing).__name__} instead of a Routing")
    table = tuple(routing.expert_ids_TK.shape)
    expected = {
        "logits_TE": ((num_tokens, num_experts), torch.float32),
        "probs_TE": ((num_tokens, num_experts), torch.float32),
        "expert_ids_TK": ((num_tokens, *table[1:2]), torch.int64),
        "weights_TK": (table, torch.float32),
        "kept_TK": (table, torch.bool),
    }
    for name, (shape, dtype) in expected.items():
        tensor = getattr(routing, name)
        is_optional = name in ("logits_TE", "kept_TK")
        if tensor is None and is_optional:
            continue
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = (
                f"{tensor.dtype} of shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
            )
            fail(f"{name} as {found} instead of {dtype} of shape {shape}")
    reached_TK = routing.expert_ids_TK if routing.kept_TK is None else routing.expert_ids_TK[routing.kept_TK]
    if ((reached_TK < 0) | (reached_TK >= num_experts)).any() or (routing.expert_ids_TK < 0).any():
        fail(f"expert_ids_TK outside 0 to {num_experts - 1} for pairs that are kept")
    if num_tokens and (routing.probs_TE.sum(dim=-1) - 1).abs().max() > 1e-3:
        fail("probs_TE that do not sum to 1 for each token")
    if not routing.weights_TK.isfinite().all():
        fail("weights_TK that are not finite")
    if routing.kept_TK is not None and (routing.weights_TK[~routing.kept_TK] != 0).any():
        fail("weights_TK other than 0 for pairs that are not kept")
