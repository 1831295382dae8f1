"""Statistics, specialisation and probes of routers that are known to do something or nothing."""

import math

import numpy as np
import pytest
import torch

from moe_ray.analytics.analysis import Specialisation
from moe_ray.analytics.collect import collect, collect_drift
from moe_ray.analytics.drift import drift
from moe_ray.analytics.held_out import HeldOut, cut_units
from moe_ray.analytics.labels import Labels, class_labels, domain_labels, position_labels
from moe_ray.analytics.layers import flows, layer_statistics, top_token_ids
from moe_ray.analytics.probes import probe_patterns
from moe_ray.analytics.significance import max_t
from moe_ray.analytics.specialise import specialisation
from moe_ray.analytics.token_classes import CLASSES, classify
from moe_ray.data.tokenizer import Tokenizer, train_tokenizer
from moe_ray.models.transformer import Transformer
from tests.planted import EXPERTS, LENGTH, VOCAB, documents, planted_model

pytestmark = pytest.mark.usefixtures("one_thread")
# One of 20 analyses of nothing finds something at 5%; more than this many do so in one of a thousand trials.
SEEDS, MOST_FALSE = 20, 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, 12 + 7 = 19; (see) [it] {x}\n"] * 5, 300)


def by_domain(model: Transformer, text: HeldOut, seed: int = 0) -> Specialisation:
    return specialisation(collect(model, text.tokens_NS, [domain_labels(text, 99, seed)]).labels[0], (0, 1))


def make_labels(kind: str, text: HeldOut, tokenizer: Tokenizer, seed: int) -> Labels:
    if kind == "token_class":
        return class_labels(text, tokenizer, np.ones(VOCAB, int), 99, seed)
    return (domain_labels if kind == "domain" else position_labels)(text, 99, seed)


def finds_something(found: Specialisation) -> tuple[bool, bool]:
    """Whether any layer, and any expert, is significant."""
    preferences = [expert for layer in found.layers for expert in layer.experts]
    return any(layer.is_significant for layer in found.layers), any(
        expert.is_significant for expert in preferences
    )


def test_experts_that_are_the_domains_know_all_of_them() -> None:
    text = documents(np.random.default_rng(0), (1, 2, 1, 3, 1, 2, 1, 1))
    # Ids of a domain are those of one expert.
    quarter = VOCAB // EXPERTS
    tokens_NS = text.tokens_NS % quarter + quarter * text.domains_N[:, None]
    found = by_domain(planted_model("RangeRouter"), HeldOut(tokens_NS, text.domains, text.domains_N, text.units_N))
    assert found.label_bits == pytest.approx(math.log2(3), abs=1e-5)
    for layer in found.layers:
        assert layer.bits == pytest.approx(found.label_bits, abs=1e-5)
        assert layer.p_value == pytest.approx(0.01)
        assert layer.excess_bits == pytest.approx(layer.bits - layer.baseline_bits, rel=1e-4)
        assert layer.baseline_bits < 0.5
        assert [expert.label for expert in layer.experts] == ["a", "b", "c", None]
        assert all(expert.is_significant and expert.lift == pytest.approx(3) for expert in layer.experts[:3])
        assert not layer.experts[3].is_significant
        assert layer.shares[0] == (1, 0, 0)


@pytest.mark.parametrize("kind", ["domain", "token_class", "position"])
def test_random_routing_specialises_at_the_nominal_rate(kind: str, tokenizer: Tokenizer) -> None:
    model = planted_model("RandomRouter")
    false_layers = false_experts = 0
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        text = documents(np.random.default_rng(seed), (1, 2, 1, 3, 1, 2, 1, 1))
        labels = make_labels(kind, text, tokenizer, seed)
        layers, experts = finds_something(
            specialisation(collect(model, text.tokens_NS, [labels]).labels[0], (0, 1))
        )
        false_layers, false_experts = false_layers + layers, false_experts + experts
    assert false_layers <= MOST_FALSE
    assert false_experts <= MOST_FALSE


def test_documents_of_their_own_kind_are_no_specialisation_in_domains() -> None:
    model = planted_model("RangeRouter")
    false, fooled = 0, 0
    for seed in range(SEEDS):
        generator = np.random.default_rng(seed)
        text = documents(generator, (4,) * 8)
        # Each document has the ids of one expert, whatever its domain.
        quarter = VOCAB // EXPERTS
        experts_N = generator.integers(EXPERTS, size=24)[text.units_N]
        tokens_NS = text.tokens_NS % quarter + quarter * experts_N[:, None]
        false += finds_something(by_domain(model, HeldOut(tokens_NS, text.domains, text.domains_N, text.units_N)))[
            0
        ]
        each_N = np.arange(len(tokens_NS))
        fooled += finds_something(by_domain(model, HeldOut(tokens_NS, text.domains, text.domains_N, each_N)))[0]
    assert false <= MOST_FALSE
    # Permuting sequences one by one would have found something nearly always.
    assert fooled > SEEDS // 2


def test_position_and_class_are_found_where_they_decide(tokenizer: Tokenizer) -> None:
    ids = np.random.default_rng(0).permutation(tokenizer.vocab_size)[: 24 * 64].astype(np.int64)
    tokens_NS = np.resize(ids, (24, LENGTH))
    text = HeldOut(tokens_NS, ("a",), np.zeros(24, int), np.arange(24) // 3)
    in_turn = planted_model("forced_balance", vocab_size=300, top_k=1)
    by_position = collect(in_turn, tokens_NS, [position_labels(text, 99, 0)]).labels[0]
    # The first token is always that of expert 0, the second that of expert 1.
    layer = specialisation(by_position, (0, 1)).layers[0]
    assert layer.is_significant
    assert (layer.experts[0].label, layer.experts[1].label) == ("0", "1")
    by_id = planted_model("hash", vocab_size=300, top_k=1, num_experts=64)
    classes = class_labels(text, tokenizer, np.bincount(tokens_NS.ravel(), minlength=300), 99, 0)
    assert specialisation(collect(by_id, tokens_NS, [classes]).labels[0], (0, 1)).layers[0].is_significant


def test_max_t_keeps_its_level_whatever_the_number_of_statistics() -> None:
    generator = np.random.default_rng(0)
    for size in (1, 2000):
        hits = [max_t(x[0], x[1:])[1].min() <= 0.05 for x in generator.normal(size=(200, 100, size)).astype("f4")]
        assert 2 <= sum(hits) <= 22


def test_small_domains_are_cut_into_units() -> None:
    domains_N = np.array([0] * 20 + [1] * 3)
    units_N = cut_units(domains_N, np.zeros(23, int))
    assert len(np.unique(units_N[:20])) == 8
    assert len(np.unique(units_N[20:])) == 3
    assert (np.diff(units_N) >= 0).all()


def test_statistics_are_those_of_the_tokens() -> None:
    model = planted_model("RangeRouter")
    tokens_NS = np.array([[0, 0, 1, 20, 20, 40]] * 5, np.int64)
    found = collect(model, tokens_NS, [])
    layer, _ = layer_statistics((0, 1), found.sums, 30, found.pairs, [[[]] * EXPERTS] * 2)
    assert layer.tokens_per_expert == (15, 10, 5, 0)
    assert layer.load_max_over_mean == pytest.approx(2)
    assert (layer.dead_experts, layer.overloaded_experts) == ((3,), ())
    bits = -(0.5 * math.log2(0.5) + math.log2(1 / 3) / 3 + math.log2(1 / 6) / 6)
    assert layer.marginal_entropy_bits == pytest.approx(bits, abs=1e-5)
    assert layer.marginal_entropy == pytest.approx(layer.marginal_entropy_bits / 2, abs=1e-5)
    assert (layer.token_entropy_bits, layer.confidence, layer.margin) == (0, 1, 1)
    assert (layer.choice_overlap, layer.choice_dependence) == (None, None)
    (flow,) = flows((0, 1), found.pairs)
    assert {(link.source, link.target, link.tokens) for link in flow.links.links} == {
        (0, 0, 15),
        (1, 1, 10),
        (2, 2, 5),
    }
    assert flow.dependence_bits == pytest.approx(layer.marginal_entropy_bits, abs=1e-5)
    assert [[token_id for token_id, _, _ in expert] for expert in top_token_ids(found.tokens)[0]] == [
        [0, 1],
        [20],
        [40],
        [],
    ]


def test_choices_of_two_experts() -> None:
    model = planted_model("top_k", top_k=2, init_std=0.5)
    tokens_NS = np.random.default_rng(0).integers(VOCAB, size=(40, LENGTH))
    found = collect(model, tokens_NS, [])
    with torch.no_grad():
        routings = model(torch.from_numpy(tokens_NS)).routings
    layers = layer_statistics((0, 1), found.sums, tokens_NS.size, found.pairs, [[[]] * EXPERTS] * 2)
    for layer, routing in zip(layers, routings, strict=True):
        pairs = np.zeros((EXPERTS, EXPERTS), int)
        np.add.at(pairs, tuple(routing.expert_ids_TK.T.numpy()), 1)
        first, second = pairs.sum(axis=1), pairs.sum(axis=0)
        assert layer.choice_overlap == pytest.approx(np.minimum(first, second).sum() / tokens_NS.size)
        assert 0 < layer.choice_dependence <= 1
        together = {(link.source, link.target): link.tokens for link in layer.co_activation.links}
        assert together == {
            (i, j): n for i in range(EXPERTS) for j in range(i + 1, EXPERTS) if (n := pairs[i, j] + pairs[j, i])
        }
        top = routing.probs_TE.topk(2).values
        assert layer.confidence == pytest.approx(top[:, 0].mean().item(), rel=1e-5)
        assert layer.margin == pytest.approx((top[:, 0] - top[:, 1]).mean().item(), rel=1e-4)


def test_drift_counts_tokens_that_moved() -> None:
    tokens_NS = np.random.default_rng(0).integers(VOCAB, size=(40, LENGTH))
    model, other = planted_model("hash", top_k=2), planted_model("hash", top_k=2)
    same = drift(collect_drift(model, tokens_NS), collect_drift(model, tokens_NS), (1, 2), (0, 1), EXPERTS)
    assert [(each.changed, each.jaccard, each.swapped) for each in same.layers] == [(0, 1, 0)] * 2
    table_VK = model.layers[0].ffn.router.expert_ids_VK
    other.layers[0].ffn.router.expert_ids_VK.copy_(table_VK.flip(1))
    other.layers[1].ffn.router.expert_ids_VK.copy_((model.layers[1].ffn.router.expert_ids_VK + 1) % EXPERTS)
    swapped, shifted = drift(
        collect_drift(model, tokens_NS), collect_drift(other, tokens_NS), (1, 2), (0, 1), EXPERTS
    ).layers
    assert (swapped.changed, swapped.jaccard, swapped.first_changed, swapped.swapped) == (0, 1, 1, 1)
    assert shifted.changed == shifted.first_changed == 1
    assert shifted.jaccard < 1 / 3 + 1e-9


def test_the_probe_names_the_expert_of_repetition(tokenizer: Tokenizer) -> None:
    found = {
        probe.pattern: probe
        for probe in probe_patterns(planted_model("RepeatRouter", vocab_size=300), tokenizer, 24, 0)
    }
    best = found["repetition"].experts[0]
    assert (best.expert, best.is_significant) == (2, True)
    assert best.share == pytest.approx(1)
    assert best.effect > 0.4
    # Ids alone decide, and they are the same in prompt and control.
    for probe in probe_patterns(planted_model("hash", vocab_size=300), tokenizer, 24, 0):
        assert all(not effect.is_significant and effect.effect == pytest.approx(0) for effect in probe.experts)


def test_random_routing_serves_no_pattern(tokenizer: Tokenizer) -> None:
    model = planted_model("RandomRouter", vocab_size=300)
    false = 0
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        false += sum(
            any(e.is_significant for e in probe.experts) for probe in probe_patterns(model, tokenizer, 12, seed)
        )
    # 100 probes at 5%; more than 13 false ones come once in a thousand trials.
    assert false <= 13


def test_classes_of_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("; the catkin (sat) 12 == 7;\n")
    classes_S = classify(np.array([ids]), tokenizer, np.ones(tokenizer.vocab_size, int))[0]
    named = [(tokenizer.decode([token_id]), CLASSES[i]) for token_id, i in zip(ids, classes_S, strict=True)]
    assert named[:3] == [(";", "punctuation"), (" the", "word start"), (" cat", "word start")]
    assert named[3][1] == "word continuation"
    assert ("1", "number") in named
    assert ("=", "code symbol") in named
    assert named[-1] == ("\n", "whitespace") or named[-1][1] == "punctuation"
    counts_V = np.full(tokenizer.vocab_size, 10_000)
    counts_V[ids[1]] = 1
    assert classify(np.array([ids]), tokenizer, counts_V)[0, 1] == CLASSES.index("rare")
