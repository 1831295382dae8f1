"""Experts together: chosen by the same token, one after the other in adjacent layers, and over checkpoints.

Shapes: E experts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_ray.analytics.analysis import Analysis, Flow, Links
from moe_ray.analytics.report.heat import clearest_layers, heat_map, heat_map_by_layer
from moe_ray.analytics.report.parts import Figure, Part, Table
from moe_ray.analytics.report.spec import COLOURS, short

_MOST_LAYERS = 8
_MOST_LINKS = 40
_MOST_EXPERTS = 64
_HEIGHT = 420
_GAP = 0.25


def flow_parts(analysis: Analysis) -> list[Part]:
    """Figures of the section on experts together."""
    parts: list[Part] = []
    if analysis.flows:
        parts.append(_sankey(analysis))
    if any(layer.co_activation is not None for layer in analysis.layers):
        parts += _co_activation(analysis)
    if analysis.drifts:
        parts.append(_drift(analysis))
    return parts


def _sankey(analysis: Analysis) -> Figure:
    flows = _window(analysis.flows)
    loads = {layer.layer: np.array(layer.load) for layer in analysis.layers}
    columns = [flows[0].layer, *(flow.next_layer for flow in flows)]
    places = {layer: _places(loads[layer]) for layer in columns}
    nodes = [
        {"i": i, "y0": short(start), "y1": short(end), "name": f"layer {layer}, expert {expert}", "e": expert}
        for i, layer in enumerate(columns)
        for expert, (start, end) in enumerate(places[layer])
    ]
    links = [link for i, flow in enumerate(flows) for link in _ribbons(i, flow, places)]
    heads = [{"i": i, "name": str(layer)} for i, layer in enumerate(columns)]
    spec = _sankey_spec(nodes, links, heads, len(columns))
    text = (
        "Tokens from the experts of a layer, whose number is above, to those of the next one; bars are "
        "as high as the load. The darker a band, the more tokens take it than would if layers chose independently."
    )
    if len(flows) < len(analysis.flows):
        text += f" Of {len(analysis.flows) + 1} layers, the {len(columns)} that depend most on each other."
    share = min(flow.links.share for flow in flows)
    if share < 1 or any(len(flow.links.links) > _MOST_LINKS for flow in flows):
        text += f" The {_MOST_LINKS} largest bands of each pair of layers."
    rows = [
        (f"{flow.layer}.{link.source}", f"{flow.next_layer}.{link.target}", link.tokens)
        for flow in flows
        for link in flow.links.links[:10]
    ]
    dependence = "; ".join(f"{flow.layer} to {flow.next_layer}: {flow.dependence_bits:.3f} bits" for flow in flows)
    note = f"The ten largest of each pair. Mutual information of adjacent layers: {dependence}."
    return Figure(
        "flow", "Flow of tokens", text, spec, Table(("from layer.expert", "to", "tokens"), rows, note=note)
    )


def _window(flows: Sequence[Flow]) -> Sequence[Flow]:
    """Adjacent flows that a picture has room for, those of the largest dependence."""
    most = _MOST_LAYERS - 1
    starts = range(max(1, len(flows) - most + 1))
    return max(
        (flows[s : s + most] for s in starts), key=lambda window: sum(flow.dependence_bits for flow in window)
    )


def _places(load_E: np.ndarray) -> list[tuple[float, float]]:
    """Where the bars of experts begin and end, from 0 to 1, as high as their load."""
    heights_E = load_E / max(float(load_E.sum()), 1e-12) * (1 - _GAP)
    gap = _GAP / max(1, len(heights_E) - 1)
    ends_E = np.cumsum(heights_E + gap) - gap
    return list(zip((ends_E - heights_E).tolist(), ends_E.tolist(), strict=True))


def _ribbons(i: int, flow: Flow, places: dict[int, list[tuple[float, float]]]) -> list[dict[str, Any]]:
    """Bands from one layer to the next: side by side on the bars, in the order of the experts at the other end."""
    total = max(1.0, sum(link.tokens for link in flow.links.links) / max(flow.links.share, 1e-9))
    left, right = places[flow.layer], places[flow.next_layer]
    drawn = flow.links.links[:_MOST_LINKS]
    used_left, used_right = [start for start, _ in left], [start for start, _ in right]
    ribbons = []
    ends = {}
    for link in sorted(drawn, key=lambda link: (link.target, link.source)):
        width = link.tokens / total * (1 - _GAP)
        ends[link.source, link.target] = used_right[link.target] + width / 2
        used_right[link.target] += width
    for link in sorted(drawn, key=lambda link: (link.source, link.target)):
        width = link.tokens / total * (1 - _GAP)
        start = used_left[link.source] + width / 2
        used_left[link.source] += width
        expected = _height(left[link.source]) * _height(right[link.target]) / (1 - _GAP)
        ribbons.append(
            {
                "i": i,
                "s": short(start),
                "t": short(ends[link.source, link.target]),
                "w": short(width),
                "lift": short(width / max(expected, 1e-9)),
                "tokens": link.tokens,
                "name": f"{flow.layer}.{link.source} → {flow.next_layer}.{link.target}",
            }
        )
    return ribbons


def _height(place: tuple[float, float]) -> float:
    return place[1] - place[0]


def _sankey_spec(
    nodes: list[dict[str, Any]], links: list[dict[str, Any]], heads: list[dict[str, Any]], columns: int
) -> dict[str, Any]:
    """Vega: Vega-Lite has no bands."""
    bar = 12
    x = f"datum.i * (width - {bar}) / {columns - 1}"
    linkpath = {
        "type": "linkpath",
        "orient": "horizontal",
        "shape": "diagonal",
        "sourceX": {"expr": f"{x} + {bar}"},
        "sourceY": {"expr": "datum.s * height"},
        "targetX": {"expr": f"(datum.i + 1) * (width - {bar}) / {columns - 1}"},
        "targetY": {"expr": "datum.t * height"},
    }
    tooltip = {
        "signal": "{tokens: datum.name, count: datum.tokens, 'over independent': format(datum.lift, '.2f')}"
    }
    band = {
        "path": {"field": "path"},
        "stroke": {"value": COLOURS[0]},
        "strokeWidth": {"signal": "max(0.4, datum.w * height)"},
        "strokeOpacity": {"signal": "clamp(0.1 + 0.3 * (datum.lift - 0.6), 0.06, 0.85)"},
        "tooltip": tooltip,
    }
    node = {
        "x": {"signal": x},
        "width": {"value": bar},
        "y": {"signal": "datum.y0 * height"},
        "y2": {"signal": "datum.y1 * height"},
        "fill": {"value": "currentColor"},
        "tooltip": {"field": "name"},
    }
    few = len(nodes) <= columns * 24
    number = {
        "x": {"signal": f"{x} + (datum.i === {columns - 1} ? -4 : {bar} + 4)"},
        "align": {"signal": f"datum.i === {columns - 1} ? 'right' : 'left'"},
        "y": {"signal": "(datum.y0 + datum.y1) / 2 * height"},
        "baseline": {"value": "middle"},
        "text": {"signal": f"{str(few).lower()} && datum.y1 - datum.y0 > 0.02 ? '' + datum.e : ''"},
        "fill": {"value": "currentColor"},
        "fontWeight": {"value": "bold"},
        "fontSize": {"value": 11},
    }
    head = {
        "x": {"signal": f"{x} + (datum.i === 0 ? 0 : datum.i === {columns - 1} ? {bar} : {bar // 2})"},
        "align": {"signal": f"datum.i === 0 ? 'left' : datum.i === {columns - 1} ? 'right' : 'center'"},
        "y": {"value": -8},
        "text": {"signal": "'layer ' + datum.name"},
        "fill": {"value": "currentColor"},
        "fontSize": {"value": 11},
    }
    mark = {"type": "path", "from": {"data": "links"}, "encode": {"update": band}}
    hover = {"strokeOpacity": {"value": 0.95}, "stroke": {"value": COLOURS[1]}}
    return {
        "$schema": "https://vega.github.io/schema/vega/v6.json",
        "height": _HEIGHT,
        "padding": {"top": 22, "left": 2, "right": 2, "bottom": 4},
        "autosize": {"type": "none", "contains": "padding"},
        "signals": [
            {
                "name": "width",
                "init": "containerSize()[0]",
                "on": [{"events": "window:resize", "update": "containerSize()[0]"}],
            }
        ],
        "data": [
            {"name": "nodes", "values": nodes},
            {"name": "heads", "values": heads},
            {"name": "links", "values": links, "transform": [linkpath]},
        ],
        "marks": [
            {**mark, "encode": {"update": band, "hover": hover}},
            {"type": "rect", "from": {"data": "nodes"}, "encode": {"update": node}},
            {"type": "text", "from": {"data": "nodes"}, "interactive": False, "encode": {"update": number}},
            {"type": "text", "from": {"data": "heads"}, "interactive": False, "encode": {"update": head}},
        ],
    }


def _co_activation(analysis: Analysis) -> list[Part]:
    if analysis.num_experts > _MOST_EXPERTS:
        return [_pairs(analysis)]
    lifts = {
        layer.layer: _pair_lifts(layer.co_activation, np.array(layer.tokens_per_expert), analysis.tokens)
        for layer in analysis.layers
        if layer.co_activation is not None
    }
    scores = {layer: float(lifts_EE.max()) for layer, lifts_EE in lifts.items()}
    chosen = clearest_layers(scores, analysis.num_experts**2)
    lifts = {layer: lifts[layer] for layer in chosen}
    experts = range(analysis.num_experts)
    spec = heat_map_by_layer(
        lifts,
        max(chosen, key=scores.__getitem__),
        ("expert", experts),
        ("with expert", experts),
        "pairs over chance",
        2.0,
    )
    text = (
        "Tokens that chose both experts, over what the load of both would give by chance: 1 is chance. The layer "
        "is chosen below the picture; cells are brightest from 2 on."
    )
    if len(chosen) < len(scores):
        text += f" Of {len(scores)} layers, the {len(chosen)} with the clearest pairs can be chosen."
    return [Figure("co-activation", "Experts chosen together", text, spec, _pairs(analysis))]


def _pair_lifts(links: Links, tokens_E: np.ndarray, tokens: int) -> np.ndarray:
    """Over independent choices; a token chooses no expert twice, so 0 on the diagonal."""
    pairs_EE = np.zeros((len(tokens_E), len(tokens_E)))
    for link in links.links:
        pairs_EE[link.source, link.target] = pairs_EE[link.target, link.source] = link.tokens
    expected_EE = np.outer(tokens_E, tokens_E).astype(float)
    np.fill_diagonal(expected_EE, 0.0)
    expected_EE *= pairs_EE.sum() / links.share / max(expected_EE.sum(), 1e-12)
    return np.divide(pairs_EE, expected_EE, out=np.zeros_like(pairs_EE), where=expected_EE > 0)


def _pairs(analysis: Analysis) -> Table:
    rows = [
        (layer.layer, link.source, link.target, link.tokens, short(link.tokens / max(1, analysis.tokens)))
        for layer in analysis.layers
        if layer.co_activation is not None
        for link in layer.co_activation.links[:5]
    ]
    columns = ("layer", "expert", "with expert", "tokens", "share of tokens")
    return Table(
        columns, rows, note="The five most frequent pairs of each layer.", title="Experts chosen together"
    )


def _drift(analysis: Analysis) -> Figure:
    layers = [layer.layer for layer in analysis.drifts[0].layers]
    columns = [f"{drift.from_step} to {drift.to_step}" for drift in analysis.drifts]
    changed = np.array([[layer.changed for layer in drift.layers] for drift in analysis.drifts]).T
    spec = heat_map(changed, ("layer", layers), ("steps", columns), "changed share", top=1.0)
    text = (
        "Share of the same held-out tokens that a checkpoint sends to another set of experts than the one before."
    )
    rows = [
        (
            drift.from_step,
            drift.to_step,
            layer.layer,
            *map(short, (layer.changed, layer.jaccard, layer.first_changed)),
        )
        for drift in analysis.drifts
        for layer in drift.layers
    ]
    head = ("from step", "to step", "layer", "changed", "overlap (Jaccard)", "first choice changed")
    return Figure("drift", "Drift between checkpoints", text, spec, Table(head, rows))
