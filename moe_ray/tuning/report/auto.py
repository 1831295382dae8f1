"""What AutoML recommends and how sure it is: curves of equal FLOPs, and the law next to the runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_ray.analytics.report.parts import Figure, Finding, Part, Section, Spec, Table
from moe_ray.analytics.report.spec import COLOURS, DASHES, SHAPES, by_name, short
from moe_ray.config import Config
from moe_ray.tuning.auto.ladder import rung_flops
from moe_ray.tuning.auto.recommend import Estimate, Ladder, Recommendation, candidates, model_flops
from moe_ray.tuning.auto.shapes import Plan, points_of
from moe_ray.tuning.report.sweep import count_axis, text_of

_STEPS = 12
# Widths whose loss is higher than the lowest of their scale by more than this factor are not drawn.
_WORST = 1.15


def auto_findings(found: Recommendation) -> list[Finding]:
    """The first sentences of the page."""
    told = [
        Finding(
            f"Recommended for {found.flops:.3g} FLOPs: {found.label}, learning rate {found.lr.middle:.2g}, "
            f"batch {found.values['train.global_batch']}, {found.tokens:,} tokens. Its held-out loss will be "
            f"{found.loss}, says the law.",
            "isoflop",
        )
    ]
    if found.configured is not None and found.better is not None:
        told.append(
            Finding(
                f"The configured architecture would have {found.configured}; the recommended one is better with a "
                f"probability of {found.better:.0%}.",
                "law",
            )
        )
    return told + [Finding(text, "decisions") for text in found.warnings]


def auto_section(config: Config, ladder: Ladder, found: Recommendation) -> Section:
    """The section of the page."""
    return Section(
        "auto",
        "Recommendation",
        [
            _settings(found),
            _decisions(found),
            _isoflop(config, ladder, found),
            _law(config, ladder, found),
            _checks(found),
            _parameters(found),
        ],
    )


def _settings(found: Recommendation) -> Part:
    rows = [(name, text_of(value)) for name, value in found.values.items()]
    note = (
        f"best.yaml has all settings. The largest run that the law was fitted to has 1/{found.extrapolation:.0f} "
        f"of these FLOPs. Best learning rate, 90%: {found.lr.low:.2g} to {found.lr.high:.2g}."
    )
    return Table(("setting", "value"), rows, "Recommended settings", note)


def _decisions(found: Recommendation) -> Part:
    head = (
        "setting",
        "chosen",
        "next best",
        "probability that the choice is better",
        "gain (nats)",
        "90% from",
        "to",
    )
    rows = []
    for item in found.decisions:
        gain = item.gain or Estimate(math.nan, math.nan, math.nan)
        of_gain = [short(value, 2) for value in (gain.middle, gain.low, gain.high)]
        rows.append((item.setting, item.value, item.other, f"{item.sure:.0%}", *of_gain))
    note = "Each choice next to the best model that differs there, whatever else that one has: 50% is not knowing."
    return Table(head, rows, "How sure each choice is", note, "decisions")


def _isoflop(config: Config, ladder: Ladder, found: Recommendation) -> Figure:
    """Loss over width at equal FLOPs, of the scales of the ladder and of the recommendation."""
    scales = [*rung_flops(config), model_flops(config)]
    points = []
    for flops in scales:
        by_width = _by_width(config, ladder, flops)
        worst = _WORST * min(estimate.middle for _, estimate in by_width)
        points += [
            {
                "active": plan.shape.active,
                **_bounds(estimate, has_band=flops == scales[-1]),
                "of": f"{flops:.2g} FLOPs",
                "model": plan.shape.label,
            }
            for plan, estimate in by_width
            if estimate.middle <= worst
        ]
    chosen = {"active": found.active, "loss": short(found.loss.middle), "model": found.label, "of": "recommended"}
    spec = _chart(count_axis("active", "active parameters", log=True), points, points, chosen)
    text = (
        "What the law says of each width at equal FLOPs: fewer parameters see more tokens. Every point has the "
        "experts and the batch that are best for its width. The band holds 90% of the laws that the runs leave "
        "possible; the diamond is the recommended model."
    )
    rows = [(point["of"], point["active"], point["loss"], point["model"]) for point in points]
    table = Table(("FLOPs", "active parameters", "loss", "model"), rows)
    return Figure("isoflop", "Loss at equal FLOPs", text, spec, table)


def _law(config: Config, ladder: Ladder, found: Recommendation) -> Figure:
    """Runs, and the loss of the best model at each compute with its interval."""
    frontier = []
    for flops in np.geomspace(rung_flops(config)[0], model_flops(config), _STEPS).tolist():
        plan, best = min(_by_width(config, ladder, flops), key=lambda item: item[1].middle)
        frontier.append(
            {"flops": short(flops), **_bounds(best), "of": "best models, by the law", "model": plan.shape.label}
        )
    flops_of_runs = np.exp(ladder.points.flops).tolist()
    runs = [
        {"flops": short(flops), "loss": short(loss), "of": "runs", "model": f"trial {trial.number}"}
        for flops, loss, trial in zip(flops_of_runs, ladder.losses.tolist(), ladder.trials, strict=True)
    ]
    chosen = {"flops": found.flops, "loss": short(found.loss.middle), "model": found.label, "of": "recommended"}
    spec = _chart(count_axis("flops", "training FLOPs", log=True), frontier, runs, chosen)
    text = (
        "Points are the runs of the ladder, with all kinds of models, rates and batches; the line is what the law "
        "says of the best ones, which most runs are worse than. The band holds 90% of the laws that the runs "
        "leave possible. Right of the last points it is extrapolated, up to the recommended model, the diamond."
    )
    rows = [(point["flops"], point["loss"], point["low"], point["high"], point["model"]) for point in frontier]
    table = Table(("FLOPs", "loss of the best", "90% from", "to", "model"), rows)
    return Figure("law", "The law and the runs", text, spec, table)


def _bounds(estimate: Estimate, *, has_band: bool = True) -> dict[str, float | None]:
    """A loss as a point of a chart, and the ends of its band."""
    low, high = (estimate.low, estimate.high) if has_band else (math.nan, math.nan)
    return {"loss": short(estimate.middle), "low": short(low), "high": short(high)}


def _chart(x: Mapping[str, Any], lines: Sequence[Spec], points: Sequence[Spec], chosen: Spec) -> dict[str, Any]:
    """Losses over an axis, named by `of`: lines, of which some have a band, points, and the recommended model."""
    names = list(dict.fromkeys(value["of"] for value in (*lines, *points)))
    y = {"field": "loss", "type": "quantitative", "title": "held-out loss (nats)", "scale": {"zero": False}}
    named = {"field": "of", "type": "nominal", "title": None, "legend": {"symbolOpacity": 1}}
    colour = {**named, "scale": by_name(names, COLOURS)}
    dash = {**named, "scale": by_name(names, DASHES)}
    shape = {**named, "scale": by_name(names, SHAPES)}
    tooltip = [{"field": name, "type": "nominal"} for name in ("of", "model", x["field"], "loss")]
    dot = {"type": "point", "filled": True, "opacity": 1}
    diamond = {**dot, "shape": "diamond", "size": 160, "color": "currentColor"}
    layers = [
        {
            "data": {"values": lines},
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "area", "opacity": 0.2},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour},
        },
        {
            "data": {"values": lines},
            "mark": {"type": "line"},
            "encoding": {"x": x, "y": y, "color": colour, "strokeDash": dash},
        },
        {
            "data": {"values": points},
            "mark": {**dot, "size": 40},
            "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "tooltip": tooltip},
        },
        {"data": {"values": [chosen]}, "mark": diamond, "encoding": {"x": x, "y": y, "tooltip": tooltip}},
    ]
    return {"width": "container", "height": 300, "layer": layers}


def _checks(found: Recommendation) -> Part:
    head = ("trial", "measured", "predicted", "90% from", "to", "inside")
    rows = [
        (
            item.trial,
            short(item.measured),
            short(item.predicted.middle),
            short(item.predicted.low),
            short(item.predicted.high),
            "yes" if item.predicted.low <= item.measured <= item.predicted.high else "no",
        )
        for item in found.checks
    ]
    note = "The law was fitted to the smaller runs alone, and asked for the largest ones."
    return Table(head, rows, "The law put to the test", note, "checks")


def _parameters(found: Recommendation) -> Part:
    rows = [(name, *(short(value, 3) for value in values)) for name, values in found.law.items()]
    note = "Their meaning: docs/automl.md. Where the interval is that of the prior, the runs said nothing."
    return Table(("parameter", "most probable", "90% from", "to"), rows, "Parameters of the law", note)


def _by_width(config: Config, ladder: Ladder, flops: float) -> list[tuple[Plan, Estimate]]:
    """The best model of each width and its loss, the narrowest first."""
    plans = candidates(config, ladder.law, flops, ladder.shapes)
    loss_M = ladder.law.best(points_of(config, plans))
    best: dict[int, int] = {}
    for row, plan in enumerate(plans):
        dim = plan.shape.model.dim
        if dim not in best or loss_M[row] < loss_M[best[dim]]:
            best[dim] = row
    chosen = [plans[row] for _, row in sorted(best.items())]
    loss_RM = np.exp(ladder.law.predict(points_of(config, chosen)))
    return [(plan, Estimate.of(loss_R)) for plan, loss_R in zip(chosen, loss_RM.T, strict=True)]
