"""Whether the experts share the work: load, entropy of the router, dead experts and dropped tokens, by layer."""

from dashboards.frame import Row, frame
from dashboards.panels import alert_line, heat, line, matrix, number
from dashboards.queries import Query


def _padded(text: str, label: str) -> str:
    """The same with labels such as 7 as 007, because Grafana sorts names as text."""
    padded = f'label_replace({text}, "{label}", "0$1", "{label}", "(..)")'
    return f'label_replace({padded}, "{label}", "00$1", "{label}", "(.)")'


_LOAD = _padded("avg by (layer, expert) (moe_expert_load)", "expert")
_NOW = Row(
    "Now",
    (
        number(
            "Worst layer's collapse",
            Query("max by (run) (moe_expert_collapse)", "{{run}}"),
            None,
            ("ExpertCollapse",),
            6,
        ),
        number("Dead experts", Query("sum by (run) (moe_expert_dead)", "{{run}}"), width=6),
        number("Lowest entropy", Query("min by (run) (moe_expert_routing_entropy)", "{{run}}"), width=6),
        number("Dropped tokens", Query("moe_expert_dropped_fraction", "{{run}}"), None, ("TokensDropped",), 6),
    ),
)
_BALANCE = Row(
    "Which layers are unbalanced?",
    (
        matrix(
            "Load of each expert, now, over the balanced one",
            Query(_padded(_LOAD, "layer"), ""),
            "layer",
            "expert",
            most=2,
        ),
        line(
            "Variation of the load by layer",
            Query("moe_expert_load_cv", "layer {{layer}} {{run}}"),
            unit="",
            least=0,
        ),
        line(
            "Variance of the load fractions by layer",
            Query("moe_expert_load_variance", "layer {{layer}} {{run}}"),
            least=0,
        ),
        line(
            "Entropy of the router by layer",
            Query("moe_expert_routing_entropy", "layer {{layer}} {{run}}"),
            least=0,
            most=1,
        ),
        line(
            "Collapse by layer",
            Query("moe_expert_collapse", "layer {{layer}} {{run}}"),
            alerts=("ExpertCollapse",),
            least=0,
            most=1,
        ),
        line("Dead experts by layer", Query("moe_expert_dead", "layer {{layer}} {{run}}"), least=0),
        alert_line("Routed pairs that were dropped", "{{run}}", "TokensDropped", unit="ratio"),
    ),
)
_COURSE = Row(
    "Load of each expert over time",
    (heat("Layer $layer", Query(_LOAD, "{{expert}}"), width=24, repeat="layer"),),
)

EXPERTS = frame("experts", "Experts", __doc__, (_NOW, _BALANCE, _COURSE))
