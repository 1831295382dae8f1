"""Whether the experts share the work: load, entropy of the router, dead experts and dropped tokens, by layer."""

from dashboards.frame import Row, frame
from dashboards.panels import alert_line, heat, line, matrix, number
from dashboards.queries import Query

# Names of series sort as text: 7 becomes 007.
_PADDED = (
    'label_replace(label_replace(sum by (layer, expert) (moe_expert_load), "expert", "0$1", "expert", "(..)"), '
    '"expert", "00$1", "expert", "(.)")'
)
_NOW = Row(
    "Now",
    (
        number(
            "Worst layer's variation of load",
            Query("max by (run) (moe_expert_load_cv)", "{{run}}"),
            "",
            ("ExpertCollapse",),
            6,
        ),
        number("Dead experts", Query("sum by (run) (moe_expert_dead)", "{{run}}"), width=6),
        number("Lowest entropy", Query("min by (run) (moe_expert_routing_entropy)", "{{run}}"), width=6),
        number("Dropped tokens", Query("moe_expert_dropped_fraction", "{{run}}"), None, ("TokensDropped",), 6),
    ),
)
_LOAD = Row(
    "Which layers are unbalanced?",
    (
        matrix(
            "Load of each expert, now, over the balanced one",
            Query(f"avg by (layer, expert) ({_PADDED})", ""),
            "layer",
            "expert",
            most=2,
        ),
        alert_line("Variation of the load by layer", "layer {{layer}} {{run}}", "ExpertCollapse", unit=""),
        line(
            "Variance of the load fractions by layer", Query("moe_expert_load_variance", "layer {{layer}} {{run}}")
        ),
        line(
            "Entropy of the router by layer",
            Query("moe_expert_routing_entropy", "layer {{layer}} {{run}}"),
            least=0,
            most=1,
        ),
        line("Dead experts by layer", Query("moe_expert_dead", "layer {{layer}} {{run}}"), width=12, least=0),
        alert_line("Routed pairs that were dropped", "{{run}}", "TokensDropped", unit="ratio", width=12),
    ),
)
_COURSE = Row(
    "Load of each expert over time",
    (heat("Layer $layer", Query(_PADDED, "{{expert}}"), width=24, repeat="layer"),),
)

EXPERTS = frame("experts", "Experts", __doc__, (_NOW, _LOAD, _COURSE))
