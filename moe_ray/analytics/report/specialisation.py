"""What experts are for: information about labels, preferences with their significance, top tokens, pattern probes.

Shapes: E experts, M labels.
"""

from collections.abc import Sequence

import numpy as np

from moe_ray.analytics.analysis import (
    Analysis,
    ExpertEffect,
    LabelKind,
    LayerSpecialisation,
    Specialisation,
    Token,
)
from moe_ray.analytics.report.heat import MOST_CELLS, clearest_layers, heat_map_by_layer
from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.spec import COLOURS, by_name, short

_MOST_PREFERENCES = 60
_MOST_EXPERTS = 400
_TOKENS_OF_EXPERT = 8
_EFFECTS_OF_PATTERN = 6
_BRIGHTEST_LIFT = 2.0


def specialisation_parts(analysis: Analysis) -> list[Part]:
    """Figures of the section on specialisation."""
    parts: list[Part] = []
    if analysis.specialisations:
        parts.append(_information(analysis.specialisations))
    for specialisation in analysis.specialisations:
        parts += [*_lifts(specialisation), _preferences(specialisation)]
    if any(layer.top_tokens for layer in analysis.layers):
        parts.append(_top_tokens(analysis))
    return parts


def probe_parts(analysis: Analysis) -> list[Part]:
    """Figure of the pattern probes."""
    effects = [
        (probe.pattern, effect) for probe in analysis.probes for effect in probe.experts[:_EFFECTS_OF_PATTERN]
    ]
    if not effects:
        return []
    values = [
        {
            "expert": f"{pattern}: {_place(effect)}",
            "effect": short(effect.effect),
            "significance": _significance(effect),
            "p": _p(effect.p_value),
        }
        for pattern, effect in effects
    ]
    scale = by_name(["significant", "not significant"], [COLOURS[0], COLOURS[1]])
    shape = {**scale, "range": ["circle", "cross"]}
    # A number of columns that changes with the width would be cut: names leave a phone little of it.
    one_column = {"columns": 1}
    encoding = {
        "y": {"field": "expert", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 220}},
        "x": {
            "field": "effect",
            "type": "quantitative",
            "title": ["share with the pattern", "less share without"],
        },
        "color": {"field": "significance", "type": "nominal", "title": None, "scale": scale, "legend": one_column},
        "shape": {"field": "significance", "type": "nominal", "title": None, "scale": shape, "legend": one_column},
        "tooltip": [{"field": name, "type": "nominal"} for name in ("expert", "effect", "p")],
    }
    spec = {
        "width": "container",
        "height": 18 * len(values),
        "data": {"values": values},
        "layer": [
            {"mark": {"type": "rule", "color": "currentColor"}, "encoding": {"x": {"datum": 0}}},
            {"mark": {"type": "point", "filled": True, "size": 70}, "encoding": encoding},
        ],
    }
    text = (
        "How much more of the routing weight an expert gets with a pattern than in controls of the same length. "
    )
    text += " ".join(f"{probe.pattern}: {probe.description.rstrip('.')}." for probe in analysis.probes)
    rows = [
        (
            pattern,
            effect.layer,
            effect.expert,
            *map(short, (effect.share, effect.control_share, effect.z)),
            short(effect.p_value),
        )
        for pattern, effect in effects
    ]
    table = Table(("pattern", "layer", "expert", "share", "share in controls", "z", "corrected p"), rows)
    return [Figure("probes", "Experts of patterns", text, spec, table)]


def visible(token: str) -> str:
    """A token with its white space to be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def _information(specialisations: Sequence[Specialisation]) -> Figure:
    values = [
        {
            "layer": layer.layer,
            "kind": _words(each.kind),
            "known": short(layer.excess_bits / each.label_bits if each.label_bits else 0.0),
            "star": "*" if layer.is_significant else "",
            "p": _p(layer.p_value),
        }
        for each in specialisations
        for layer in each.layers
    ]
    names = [_words(each.kind) for each in specialisations]
    x = {"field": "layer", "type": "ordinal", "axis": {"labelAngle": 0}}
    y = {"field": "known", "type": "quantitative", "title": "known of the label", "axis": {"format": ".1~%"}}
    offset = {"field": "kind", "type": "nominal", "sort": names}
    colour = {"field": "kind", "type": "nominal", "title": None, "sort": names, "scale": by_name(names, COLOURS)}
    tooltip = [{"field": name, "type": "nominal"} for name in ("kind", "layer", "known", "p")]
    star = {"type": "text", "dy": -5, "fontWeight": "bold", "color": "currentColor"}
    spec = {
        "width": "container",
        "height": 200,
        "data": {"values": values},
        "encoding": {"x": x, "y": y, "xOffset": offset},
        "layer": [
            {"mark": {"type": "bar"}, "encoding": {"color": colour, "tooltip": tooltip}},
            {"mark": star, "encoding": {"text": {"field": "star", "type": "nominal"}}},
        ],
    }
    text = (
        "Mutual information between expert and label above that of permuted labels, over the entropy of the "
        "label: 0 is chance, 100% would tell the label. A star marks what chance makes in less than 5% of "
        f"analyses. Bars of a layer from left to right: {', '.join(names)}."
    )
    rows = [
        (
            _words(each.kind),
            layer.layer,
            *map(short, (layer.bits, layer.baseline_bits, layer.excess_bits)),
            _p(layer.p_value),
        )
        for each in specialisations
        for layer in each.layers
    ]
    columns = ("label", "layer", "bits", "bits by chance", "excess", "corrected p")
    return Figure("information", "What experts know of a token", text, spec, Table(columns, rows))


def _lifts(each: Specialisation) -> list[Part]:
    layers = [layer for layer in each.layers if layer.shares]
    kind = _words(each.kind)
    if not layers or len(layers[0].shares) * len(each.labels) > MOST_CELLS:
        return [Missing(f"Experts by {kind}", "The table of experts and labels is too large for a page.")]
    base_M = np.maximum(np.array(each.label_shares), 1e-12)
    cells = len(layers[0].shares) * len(base_M)
    chosen = clearest_layers({layer.layer: layer.excess_bits for layer in layers}, cells)
    lifts = {layer.layer: np.array(layer.shares) / base_M for layer in layers if layer.layer in chosen}
    best = max(layers, key=lambda layer: layer.excess_bits).layer
    experts = range(len(layers[0].shares))
    spec = heat_map_by_layer(
        lifts, best, ("expert", experts), (kind, each.labels), "share over that of all experts", _BRIGHTEST_LIFT
    )
    text = (
        f"Share of each {kind} in an expert's routing weight, over its share among all experts: 1 is no "
        f"preference. The layer is chosen below the picture; cells are brightest from {_BRIGHTEST_LIFT:g} on. "
        f"Permuted for the significance: {each.permuted.rstrip('.')}, {each.permutations} times."
    )
    if len(chosen) < len(layers):
        text += f" Of {len(layers)} layers, the {len(chosen)} that know most of it can be chosen."
    rows = [(number, *map(short, row)) for number, row in enumerate(lifts[best].tolist())]
    table = Table(("expert", *each.labels), rows, note=f"Of layer {best}, which knows most of it.")
    return [Figure(f"by-{each.kind.replace('_', '-')}", f"Experts by {kind}", text, spec, table)]


def _preferences(each: Specialisation) -> Table:
    found = [
        (layer.layer, expert) for layer in each.layers for expert in layer.experts if expert.label is not None
    ]
    found.sort(key=lambda item: (item[1].p_value, -item[1].z))
    significant = sum(expert.is_significant for _, expert in found)
    rows = [
        (
            layer,
            expert.expert,
            expert.label,
            short(expert.share),
            short(expert.lift),
            short(expert.z),
            _p(expert.p_value),
        )
        for layer, expert in found[:_MOST_PREFERENCES]
    ]
    kind = _words(each.kind)
    note = f"{significant} of {len(found)} experts prefer a {kind} significantly (corrected p at most 0.05)."
    if len(found) > len(rows):
        note += f" The {len(rows)} clearest are listed."
    columns = ("layer", "expert", kind, "share", "over all experts", "z", "corrected p")
    return Table(columns, rows, f"Preferences by {kind}", note, f"preferences-{each.kind.replace('_', '-')}")


def _top_tokens(analysis: Analysis) -> Table:
    rows = [
        (layer.layer, expert, _tokens(tokens))
        for layer in analysis.layers
        for expert, tokens in enumerate(layer.top_tokens)
        if tokens
    ]
    note = "Those that tell most about an expert, with their share of its tokens over that of all."
    if len(rows) > _MOST_EXPERTS:
        note += f" {_MOST_EXPERTS} of {len(rows):,} experts, the first layers'."
    columns = ("layer", "expert", "tokens")
    return Table(columns, rows[:_MOST_EXPERTS], "Top tokens of experts", note, "top-tokens")


def _tokens(tokens: Sequence[Token]) -> str:
    return "   ".join(f"{visible(token.text)} {token.lift:.1f}x" for token in tokens[:_TOKENS_OF_EXPERT])


def _words(kind: LabelKind) -> str:
    return kind.replace("_", " ")


def _place(effect: ExpertEffect) -> str:
    return f"layer {effect.layer}, expert {effect.expert}"


def _significance(what: ExpertEffect | LayerSpecialisation) -> str:
    return "significant" if what.is_significant else "not significant"


def _p(value: float) -> str:
    return f"{value:.2g}"
