"""Analyses of made-up runs: small or large, with names that want to be HTML."""

import numpy as np

from moe_ray.analytics.analysis import (
    Analysis,
    Drift,
    ExpertEffect,
    ExpertPreference,
    Flow,
    LayerDrift,
    LayerSpecialisation,
    LayerStatistics,
    Link,
    Links,
    PatternProbe,
    Specialisation,
    Token,
)
from moe_ray.analytics.cost_table import Communication, Cost, Measured, Memory, ModelCost, Profile, Speed

_TOKENS = 20_000
_LINKS = 256
_LABELS = {
    "domain": ("king_james", "shakespeare", "code"),
    "token_class": ("word start", "word inside", "number", "punctuation", "code", "rare"),
    "position": tuple(f"{16 * number}-{16 * number + 15}" for number in range(8)),
}


def make_analysis(layers=4, experts=8, name="night", token="the", domains=_LABELS["domain"]) -> Analysis:
    """All questions answered, at random but equal for equal arguments."""
    rng = np.random.default_rng(0)
    labels = {**_LABELS, "domain": tuple(domains)}
    numbers = range(layers)
    return Analysis(
        run=name,
        steps=(100, 150, 200),
        router="top_k",
        num_experts=experts,
        top_k=2,
        vocab_size=4096,
        tokens=_TOKENS,
        sequences=100,
        sequence_length=200,
        layers=tuple(_layer(rng, layer, experts, token) for layer in numbers),
        flows=tuple(
            Flow(layer=layer, next_layer=layer + 1, links=_links(rng, experts), dependence_bits=rng.random())
            for layer in numbers[:-1]
        ),
        specialisations=tuple(
            _specialisation(rng, kind, names, layers, experts) for kind, names in labels.items()
        ),
        drifts=tuple(_drift(rng, step, layers) for step in (100, 150)),
        probes=tuple(_probe(rng, pattern, layers, experts) for pattern in ("repetition", "arithmetic", "copying")),
        cost=_cost(),
        missing=(),
    )


def _layer(rng, layer, experts, token):
    load_E = rng.dirichlet([20.0] * experts)
    tokens_E = np.floor(load_E * 2 * _TOKENS).astype(int)
    return LayerStatistics(
        layer=layer,
        tokens_per_expert=tuple(tokens_E.tolist()),
        load=tuple((tokens_E / tokens_E.sum()).tolist()),
        load_variance=float(load_E.var()),
        load_cv=float(load_E.std() * experts),
        load_max_over_mean=float(load_E.max() * experts),
        marginal_entropy_bits=2.9,
        marginal_entropy=0.97,
        token_entropy_bits=1.9,
        token_entropy=float(rng.uniform(0.4, 0.8)),
        dead_experts=(),
        overloaded_experts=(),
        dropped_fraction=0.0,
        confidence=float(rng.uniform(0.4, 0.8)),
        margin=float(rng.uniform(0.1, 0.4)),
        choice_overlap=0.9,
        choice_dependence=0.2,
        co_activation=_links(rng, experts, ordered=True),
        top_tokens=tuple(
            tuple(Token(token_id=n, text=f" {token}{n}\n", count=50 - n, lift=9.5 - n) for n in range(8))
            for _ in range(experts)
        ),
    )


def _links(rng, experts, ordered=False):
    pairs = [(s, t) for s in range(experts) for t in range(experts) if not ordered or s < t]
    tokens = rng.pareto(2.0, len(pairs)) * 100 + 1
    order = np.argsort(-tokens)[:_LINKS]
    links = tuple(Link(source=pairs[n][0], target=pairs[n][1], tokens=int(tokens[n])) for n in order)
    return Links(links=links, share=float(tokens[order].sum() / tokens.sum()))


def _specialisation(rng, kind, names, layers, experts):
    base_M = rng.dirichlet([10.0] * len(names))
    return Specialisation(
        kind=kind,
        labels=names,
        label_shares=tuple(base_M.tolist()),
        label_bits=float(-(base_M * np.log2(base_M)).sum()),
        permutations=200,
        units=90,
        permuted="whole documents",
        layers=tuple(_special_layer(rng, layer, names, base_M, experts) for layer in range(layers)),
    )


def _special_layer(rng, layer, names, base_M, experts):
    shares_EM = rng.dirichlet(base_M * 30, experts)
    p = 0.005 if layer % 2 else 0.4
    preferences = []
    for expert, shares_M in enumerate(shares_EM):
        best = int((shares_M / base_M).argmax())
        lift = float(shares_M[best] / base_M[best])
        fields = {"label": names[best], "share": float(shares_M[best]), "lift": lift, "z": 3 * lift, "p_value": p}
        preferences.append(ExpertPreference(expert=expert, **fields))
    bits = float(rng.uniform(0.01, 0.2))
    return LayerSpecialisation(
        layer=layer,
        bits=bits,
        baseline_bits=0.01,
        excess_bits=bits - 0.01,
        p_value=p,
        shares=tuple(map(tuple, shares_EM.tolist())),
        experts=tuple(preferences),
    )


def _drift(rng, step, layers):
    of_layers = tuple(
        LayerDrift(layer=layer, changed=rng.random(), jaccard=0.7, first_changed=0.2, swapped=0.1)
        for layer in range(layers)
    )
    return Drift(from_step=step, to_step=step + 50, tokens=_TOKENS, layers=of_layers)


def _probe(rng, pattern, layers, experts):
    effects = []
    for n in range(8):
        place = {"layer": n % layers, "expert": int(rng.integers(experts))}
        effect = float(rng.normal(0, 0.1))
        p = 0.001 if n < 4 else 0.3
        effects.append(
            ExpertEffect(**place, share=0.3, control_share=0.3 - effect, effect=effect, z=5.0, p_value=p)
        )
    return PatternProbe(
        pattern=pattern, description=f"prompts with {pattern}", pairs=64, tokens=2000, experts=tuple(effects)
    )


def _cost():
    profiles = ("this machine", "H100 SXM")
    models = []
    for name, total, active in (
        ("moe", 8e6, 4e6),
        ("dense, equal active size", 4e6, 4e6),
        ("dense, equal total size", 8e6, 8e6),
    ):
        speeds = tuple(
            Speed(
                profile=profile,
                training=5e3 * 3000**n * 4e6 / active,
                prefill=2e4 * 3000**n,
                decode=100.0 * 300**n,
                training_bound="compute",
                prefill_bound="compute",
                decode_bound="memory",
                fits=True,
            )
            for n, profile in enumerate(profiles)
        )
        models.append(
            ModelCost(
                name=name,
                params=int(total),
                active_params=int(active),
                training_flops=6 * active,
                prefill_flops=2 * active,
                decode_flops=2 * active,
                memory=Memory(
                    weights=int(4 * total),
                    gradients=int(4 * total),
                    optimizer=int(8 * total),
                    activations=10**8,
                    kv_cache_per_token=4096,
                ),
                communication=Communication(
                    dispatch_forward=2048.0,
                    combine_forward=2048.0,
                    dispatch_backward=2048.0,
                    combine_backward=2048.0,
                    gradients_per_step=3e7,
                ),
                speeds=speeds,
            )
        )
    return Cost(
        dtype="bfloat16",
        world_size=2,
        ep=2,
        context=128,
        sequence_length=128,
        batch=16,
        profiles=tuple(
            Profile(
                name=profile,
                flops=1e11 * 3000**n,
                memory_bandwidth=3e10,
                network_bandwidth=1e9,
                memory=2**34,
                efficiency=0.4,
                source="measured",
            )
            for n, profile in enumerate(profiles)
        ),
        models=tuple(models),
        measured=Measured(training=4300.0, predicted_over_measured={"this machine": 1.16, "H100 SXM": 3488.0}),
    )
