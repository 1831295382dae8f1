"""Training losses as sums over local tokens divided by a global token count.

In this form the losses of micro-batches and of ranks add up to the loss of the global batch, whatever the
world size and the gradient accumulation.

Shapes: B sequences, S tokens of each, T local tokens (B*S), K experts a token, E experts, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits_TV: Tensor, targets_T: Tensor, num_tokens: int) -> Tensor:
    """Cross-entropy in nats, summed over the local tokens and divided by `num_tokens`, in float32."""
    return F.cross_entropy(logits_TV.float(), targets_T, reduction="sum") / num_tokens


def load_balancing_loss(probs_TE: Tensor, load_fraction_E: Tensor, num_tokens: int) -> Tensor:
    """E * sum_e f_e * P_e (Fedus et al. 2021, eq. 4) with the load f_e of the global batch (Qiu et al. 2025).

    The minimum, 1, is reached when both are uniform.

    Args:
        probs_TE: router probabilities of the local tokens.
        load_fraction_E: share of all routed (token, expert) pairs that each expert received; sums to 1.
            No gradient flows through it.
        num_tokens: tokens of the global batch, so that P_e is a mean over it.
    """
    return probs_TE.shape[1] * (probs_TE.sum(dim=0) @ load_fraction_E) / num_tokens


def sequence_load_balancing_loss(
    probs_TE: Tensor, expert_ids_TK: Tensor, num_sequences: int, num_tokens: int
) -> Tensor:
    """`load_balancing_loss` of each sequence by itself, averaged (DeepSeek-AI 2024, eq. 17 to 20).

    Args:
        probs_TE: scores that sum to 1 for each token, sequence after sequence.
        expert_ids_TK: chosen experts; E stands for none.
        num_sequences: B.
        num_tokens: tokens of the global batch.
    """
    num_experts = probs_TE.shape[1]
    if num_sequences == 0:
        return probs_TE.sum() * 0
    ids_BN = expert_ids_TK.view(num_sequences, -1)
    counts_BE = torch.zeros(num_sequences, num_experts + 1, device=probs_TE.device)
    counts_BE = counts_BE.scatter_add_(1, ids_BN, torch.ones_like(ids_BN, dtype=torch.float32))[:, :-1]
    load_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp(min=1)
    probs_BE = probs_TE.view(num_sequences, -1, num_experts).sum(dim=1)
    return num_experts * (probs_BE * load_BE).sum() / num_tokens


def router_z_loss(logits_TE: Tensor, num_tokens: int) -> Tensor:
    """Mean squared log-sum-exp of the router logits (Zoph et al. 2022, eq. 5)."""
    return logits_TE.logsumexp(dim=-1).square().sum() / num_tokens
