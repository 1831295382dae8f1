"""Colours, units, thresholds and descriptions of panels, from the catalogue and the alert rules."""

from collections.abc import Mapping, Sequence

from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import DataSourceRef, Threshold, ThresholdsMode

from dashboards.queries import Query
from moe_ray.telemetry.rules import RULES

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILLION, YELLOW = "#56B4E9", "#D55E00", "#F0E442"
HUES = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION, YELLOW)
UNITS = {
    "": units.Short,
    "bytes": units.BytesIEC,
    "bytes/s": units.BytesPerSecondIEC,
    "MB": units.Megabytes,
    "ms": units.Milliseconds,
    "percent": units.Percent,
    "per second": units.CountsPerSecond,
    "ratio": units.PercentUnit,
    "requests": units.Short,
    "requests/s": units.RequestsPerSecond,
    "seconds": units.Seconds,
    "steps": units.Short,
    "times": "suffix: times",
    "tokens": units.Short,
    "tokens/s": "suffix: tokens/s",
    "unix seconds": units.DatetimeISO,
}
_SEVERITY = {"warning": ORANGE, "critical": VERMILLION}
_RULES = {rule.name: rule for rule in RULES}


def unit_of(queries: Sequence[Query], unit: str | None) -> str:
    """Grafana's name of a unit of ours, by default of that of the first metric."""
    return UNITS[queries[0].metrics[0].unit if unit is None else unit]


def thresholds(alerts: tuple[str, ...], steps: Mapping[float | None, str] | None = None) -> ThresholdsConfig:
    """Colours from which value on: given, or those of the rules, which must compare in one direction."""
    if steps is None:
        rules = sorted((_RULES[name] for name in alerts), key=lambda rule: rule.conditions[0].threshold)
        (direction,) = {rule.conditions[0].compare for rule in rules}
        limits = [rule.conditions[0].threshold for rule in rules]
        colors = [_SEVERITY[rule.severity] for rule in rules]
        # Colours hold from a value upwards; the lowest one has no value.
        steps = (
            dict(zip([None, *limits], [BLUE, *colors], strict=True))
            if direction == ">"
            else dict(zip([None, *limits], [*colors, BLUE], strict=True))
        )
    models = [Threshold(value=value, color=color) for value, color in steps.items()]
    return ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(models)


def describe(queries: Sequence[Query], alerts: tuple[str, ...] = (), note: str = "") -> str:
    """What a panel shows, from the help of its metrics, and what its alerts ask for."""
    metrics = list(dict.fromkeys(metric for query in queries for metric in query.metrics))
    paragraphs = [note] if note else []
    paragraphs += [f"`{metric.name}`{_unit(metric.unit)}: {metric.help}" for metric in metrics]
    for rule in (_RULES[name] for name in alerts):
        condition = rule.conditions[0]
        held = f" for {rule.for_seconds} s" if rule.for_seconds else ""
        what = f"{condition.compare} {condition.threshold:g}{held}"
        paragraphs.append(f"**{rule.name}** ({rule.severity}) at {what}: {rule.action} See `{rule.runbook}`.")
    return "\n\n".join(paragraphs)


def _unit(unit: str) -> str:
    return f" in {unit}" if unit not in ("", "ratio") else ""
