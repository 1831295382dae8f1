"""From counts over held-out text to the statistics of each layer and the flow between layers.

Shapes: L MoE layers, E experts, C tokens that are counted by id.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from moe_ray.analytics.analysis import Flow, LayerStatistics, Link, Links, Token
from moe_ray.analytics.counts import PairCounts, TokenCounts
from moe_ray.analytics.routing import OVERLOAD, RoutingSums
from moe_ray.analytics.significance import entropy_bits, information_bits

# Most links, and most top tokens, that are listed in all.
_MAX_LINKS = 1 << 15
_MAX_TOKENS = 1 << 14
_TOKENS_PER_EXPERT = 10
# A token that an expert got less often says nothing about it.
_MIN_COUNT = 3


def layer_statistics(
    layers: Sequence[int],
    sums: RoutingSums,
    num_tokens: int,
    pairs: PairCounts | None,
    tokens: Sequence[Sequence[Sequence[Token]]],
) -> tuple[LayerStatistics, ...]:
    """Statistics of each layer, whose number in the model is in `layers`.

    Args:
        pairs: None if they were not counted.
        tokens: top tokens by layer and expert.
    """
    by_layer = {name: values_L.tolist() for name, values_L in sums.by_layer(num_tokens).items()}
    probs_LE = sums.sums_LX[:, sums.num_experts : 2 * sums.num_experts] / num_tokens
    even_bits = math.log2(max(2, sums.num_experts))
    statistics = []
    for i, number in enumerate(layers):
        load_E, tokens_E = sums.load_fraction_LE[i], sums.tokens_per_expert_LE[i]
        marginal = entropy_bits(probs_LE[i].numpy())
        statistics.append(
            LayerStatistics(
                layer=number,
                tokens_per_expert=tuple(tokens_E.long().tolist()),
                load=tuple(load_E.tolist()),
                load_variance=by_layer["load_variance"][i],
                load_cv=by_layer["load_cv"][i],
                load_max_over_mean=by_layer["load_max_over_mean"][i],
                marginal_entropy_bits=marginal,
                marginal_entropy=marginal / even_bits,
                token_entropy_bits=by_layer["routing_entropy"][i] * even_bits,
                token_entropy=by_layer["routing_entropy"][i],
                dead_experts=tuple((tokens_E == 0).nonzero().flatten().tolist()),
                overloaded_experts=tuple((load_E * len(load_E) > OVERLOAD).nonzero().flatten().tolist()),
                dropped_fraction=by_layer["dropped_fraction"][i],
                confidence=by_layer["router_confidence"][i],
                margin=by_layer["router_margin"][i],
                choice_overlap=None if pairs is None else _choice_overlap(pairs.first_second_LEE[i]),
                choice_dependence=None if pairs is None else _choice_dependence(pairs.first_second_LEE[i]),
                co_activation=None if pairs is None else _links(pairs.together_LEE[i].triu(1), len(layers)),
                top_tokens=tuple(tuple(of_expert) for of_expert in tokens[i]),
            )
        )
    return tuple(statistics)


def flows(layers: Sequence[int], pairs: PairCounts) -> tuple[Flow, ...]:
    """Flow from each layer to the next one."""
    return tuple(
        Flow(
            layer=layer,
            next_layer=following,
            links=_links(table_EE, len(layers)),
            dependence_bits=float(information_bits(table_EE.double().numpy())),
        )
        for (layer, following), table_EE in zip(pairwise(layers), pairs.next_LEE, strict=True)
    )


def top_token_ids(counts: TokenCounts) -> list[list[list[tuple[int, int, float]]]]:
    """By layer and expert, the ids that tell most about it, with their count and lift, best first.

    What an id tells is count * log2(lift), its part in the mutual information of token and expert; frequent tokens
    that go everywhere tell nothing, and rare ones little.
    """
    num_layers, _, num_experts = counts.counts_LCE.shape
    number = max(1, min(_TOKENS_PER_EXPERT, _MAX_TOKENS // (num_layers * num_experts)))
    share_C = counts.total_C / counts.total_C.sum()
    layers = []
    for counts_CE in counts.counts_LCE.numpy():
        load_E = np.maximum(counts_CE.sum(axis=0), 1)
        lift_CE = counts_CE / load_E / share_C[:, None]
        told_CE = counts_CE * np.log2(np.maximum(lift_CE, 1.0)) * (counts_CE >= _MIN_COUNT)
        best_EC = np.argsort(-told_CE, axis=0, kind="stable")[:number].T
        layers.append(
            [
                [
                    (int(counts.ids_C[c]), int(counts_CE[c, e]), float(lift_CE[c, e]))
                    for c in best_C
                    if told_CE[c, e] > 0
                ]
                for e, best_C in enumerate(best_EC)
            ]
        )
    return layers


def _links(table_EE: Tensor, num_layers: int) -> Links:
    most = max(64, _MAX_LINKS // (2 * num_layers))
    values, places = table_EE.flatten().topk(min(most, table_EE.numel()))
    sources, targets = torch.unravel_index(places, table_EE.shape)
    rows = zip(sources.tolist(), targets.tolist(), values.tolist(), strict=True)
    links = tuple(Link(source=source, target=target, tokens=tokens) for source, target, tokens in rows if tokens)
    total = int(table_EE.sum())
    return Links(links=links, share=sum(link.tokens for link in links) / total if total else 1.0)


def _choice_overlap(first_second_EE: Tensor) -> float | None:
    total = first_second_EE.sum()
    if not total:
        return None
    first_E, second_E = first_second_EE.sum(dim=1) / total, first_second_EE.sum(dim=0) / total
    return 1 - 0.5 * (first_E - second_E).abs().sum().item()


def _choice_dependence(first_second_EE: Tensor) -> float | None:
    table = first_second_EE.double().numpy()
    entropy = entropy_bits(table.sum(axis=0)) if table.any() else 0.0
    return min(1.0, float(information_bits(table)) / entropy) if entropy else None
