"""How layers route held-out text: statistics of their loads and routers."""

from moe_ray.analytics.analysis import Analysis
from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.spec import COLOURS, SHAPES, by_name, short

_NUMBERS = (
    ("load_cv", "load CV"),
    ("marginal_entropy", "evenness of the experts"),
    ("token_entropy", "entropy of a token's router"),
    ("confidence", "confidence"),
    ("margin", "margin of the first choice"),
    ("choice_dependence", "dependence of choices"),
)


def router_parts(analysis: Analysis) -> list[Part]:
    """Figure of the section on held-out text."""
    if not analysis.layers:
        return [Missing("Routing of held-out text", "There was no held-out text to route.")]
    names = [name for _, name in _NUMBERS]
    values = [
        {"layer": layer.layer, "what": name, "value": short(value)}
        for layer in analysis.layers
        for field, name in _NUMBERS
        if (value := getattr(layer, field)) is not None
    ]
    encoding = {
        "x": {"field": "layer", "type": "ordinal", "axis": {"labelAngle": 0}},
        "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"domainMin": 0}},
        "color": {"field": "what", "type": "nominal", "title": None, "scale": by_name(names, COLOURS)},
        "shape": {"field": "what", "type": "nominal", "title": None, "scale": by_name(names, SHAPES)},
        "tooltip": [{"field": name, "type": "nominal"} for name in ("what", "layer", "value")],
    }
    mark = {"type": "point", "filled": True, "size": 80, "opacity": 0.9}
    spec = {"width": "container", "height": 220, "data": {"values": values}, "mark": mark, "encoding": encoding}
    text = (
        f"Of {analysis.tokens:,} held-out tokens at step {analysis.steps[-1]}. Entropies are over those of even "
        "choices; confidence is the mean of a token's largest probability, the margin its lead over the second; "
        "the dependence tells how far the first choice determines the second."
    )
    rows = [
        (
            layer.layer,
            *(None if (value := getattr(layer, field)) is None else short(value) for field, _ in _NUMBERS),
            short(layer.load_max_over_mean),
            len(layer.dead_experts),
            len(layer.overloaded_experts),
            short(layer.dropped_fraction),
        )
        for layer in analysis.layers
    ]
    columns = ("layer", *names, "busiest over mean", "dead", "overloaded", "dropped")
    return [Figure("routers", "Routers by layer", text, spec, Table(columns, rows))]
