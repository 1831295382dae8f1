"""Capacity-limited dispatch: an expert takes so many tokens of a sequence, later ones pass by.

Shapes: B batch, S sequence, T tokens (B*S), K experts a token, E experts, N = T * K routed pairs.
"""

import dataclasses
import math

import torch

from moe_ray.models.router import Routing


def expert_capacity(capacity_factor: float, length: int, top_k: int, num_experts: int) -> int:
    """Tokens that an expert takes from a sequence of `length`: capacity_factor times the mean, rounded up."""
    # 1.1 * 100 / 10 is a little more than 11 in floating point.
    return max(1, math.ceil(capacity_factor * length * top_k / num_experts - 1e-9))


def limit_capacity(routing: Routing, batch: int, capacity: int) -> Routing:
    """Drop the pairs that exceed `capacity` tokens an expert and sequence; earlier tokens go first.

    A dropped token keeps what its other experts and the residual stream give it (Fedus et al. 2021, 2.2). The
    limit holds in each sequence by itself (the groups of Lepikhin et al. 2020, 3.1): so it is the same for any
    batch size, accumulation and world size, and no token is dropped because of one that follows it.
    """
    num_experts = routing.num_experts
    ids_TK = routing.expert_ids_TK
    if routing.kept_TK is not None:
        ids_TK = ids_TK.masked_fill(~routing.kept_TK, num_experts)
    ids_N = ids_TK.flatten()
    sequences_N = torch.arange(batch, device=ids_N.device).repeat_interleave(ids_N.numel() // max(1, batch))
    # One queue for each sequence and expert, and one more for pairs without an expert.
    queues_N = sequences_N * (num_experts + 1) + ids_N
    order_N = torch.argsort(queues_N, stable=True)
    lengths = torch.zeros(batch * (num_experts + 1), dtype=torch.int64, device=ids_N.device)
    lengths.scatter_add_(0, queues_N, torch.ones_like(queues_N))
    starts = lengths.cumsum(0) - lengths
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(order_N.numel(), device=ids_N.device) - starts[queues_N[order_N]]
    kept_TK = (position_N < capacity).view_as(ids_TK) & (ids_TK < num_experts)
    num_dropped = (ids_TK < num_experts).sum() - kept_TK.sum()
    return dataclasses.replace(
        routing,
        weights_TK=routing.weights_TK * kept_TK,
        kept_TK=kept_TK,
        num_dropped=num_dropped if routing.num_dropped is None else num_dropped + routing.num_dropped,
    )
