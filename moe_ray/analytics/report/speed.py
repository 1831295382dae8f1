"""Throughput, and where the time of a training step goes."""

import numpy as np

from moe_ray.analytics.report.curves import series_table
from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.run import Run
from moe_ray.analytics.report.spec import (
    COLOURS,
    Series,
    by_name,
    line_chart,
    over_time,
    points_of,
    short,
    step_axis,
    thin,
    was_thinned,
)

# Seconds that the run logs, but not as parts of a step.
_NO_PHASES = {"step", "restore", "checkpoint_stall", "checkpoint_write"}
_NAMES = {
    "data": "batches",
    "dispatch": "expert dispatch",
    "reduce": "gradient reduction",
    "optimizer": "optimizer",
}
_ORDER = ("data", "forward", "dispatch", "backward", "reduce", "optimizer")


def phases(run: Run) -> dict[str, np.ndarray]:
    """Seconds [N] of each phase of the logged steps, in the order of a step."""
    found = {
        name.removesuffix("_seconds"): values
        for name, values in run.history.columns.items()
        if name.endswith("_seconds") and name.removesuffix("_seconds") not in _NO_PHASES
    }
    order = sorted(found, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    return {_NAMES.get(name, name): found[name] for name in order}


def phase_shares(run: Run) -> dict[str, float]:
    """Share of each phase in the time of all phases of the logged steps, largest first."""
    sums = {name: float(np.nansum(values)) for name, values in phases(run).items()}
    total = sum(sums.values())
    shares = {name: value / total for name, value in sums.items()} if total else {}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def speed_parts(run: Run) -> list[Part]:
    """Figures of the section on speed."""
    if run.steps is None:
        return [Missing("Throughput", "The run has not logged a step yet.")]
    if not phase_shares(run):
        return [_throughput(run), Missing("Where the time of a step goes", "The run logged no times of phases.")]
    return [_throughput(run), _shares(run), _split(run), *_world(run)]


def _throughput(run: Run) -> Figure:
    assert run.steps is not None
    lines = [Series("tokens/s", run.history.column("step"), run.history.column("tokens_per_second"))]
    text = "Training tokens per second, mean since the previous logged step." + was_thinned(lines)
    spec = line_chart(lines, run.axis_marks, run.steps, y_title="tokens/s", zero=True, height=180)
    return Figure("throughput", "Throughput", text, spec, series_table(lines))


def _shares(run: Run) -> Figure:
    shares = phase_shares(run)
    seconds = {name: float(np.nanmean(values)) for name, values in phases(run).items()}
    values = [
        {"phase": name, "share": short(share), "label": f"{share:.0%}", "seconds": short(seconds[name])}
        for name, share in shares.items()
    ]
    encoding = {
        "y": {"field": "phase", "type": "nominal", "sort": None, "title": None},
        "x": {"field": "share", "type": "quantitative", "title": "share of a step", "axis": {"format": "%"}},
        "tooltip": [
            {"field": "phase", "type": "nominal"},
            {"field": "label", "type": "nominal", "title": "share"},
            {"field": "seconds", "type": "quantitative", "title": "mean seconds"},
        ],
    }
    label = {"mark": {"type": "text", "align": "left", "dx": 4, "color": "currentColor"}}
    spec = {
        "width": "container",
        "height": 26 * len(values),
        "data": {"values": values},
        "encoding": encoding,
        "layer": [
            {"mark": {"type": "bar", "color": COLOURS[0]}},
            {**label, "encoding": {"text": {"field": "label", "type": "nominal"}}},
        ],
    }
    text = "Where the time of a step goes, on rank 0: mean over all logged steps, each moment counted once."
    rows = [(name, short(share), short(seconds[name])) for name, share in shares.items()]
    table = Table(("phase", "share of a step", "mean seconds"), rows)
    return Figure("time-shares", "Where the time of a step goes", text, spec, table)


def _split(run: Run) -> Figure:
    assert run.steps is not None
    steps = run.history.column("step")
    lines = [Series(name, steps, values) for name, values in phases(run).items()]
    values = [
        point | {"order": order} for order, line in enumerate(lines) for point in thin(line, points_of(len(lines)))
    ]
    names = [line.name for line in lines]
    colour = {"field": "series", "type": "nominal", "title": None, "scale": by_name(names, COLOURS), "sort": names}
    encoding = {
        "x": step_axis(),
        "y": {"field": "value", "type": "quantitative", "title": "seconds", "stack": "zero"},
        "color": colour,
        "order": {"field": "order", "type": "quantitative"},
        "tooltip": [{"field": "series", "type": "nominal", "title": "phase"}],
    }
    mark = {"type": "area", "opacity": 0.85, "line": {"color": "currentColor", "strokeWidth": 0.7}}
    shown = [{"filter": "datum.step >= from && datum.step <= to"}]
    layer = {"data": {"values": values}, "transform": shown, "mark": mark, "encoding": encoding}
    text = "Exclusive seconds of each phase of the logged steps, stacked; in the legend's order from below."
    spec = over_time([layer], run.axis_marks, run.steps, 220)
    return Figure("time-split", "Step time by phase", text + was_thinned(lines), spec, series_table(lines))


def _world(run: Run) -> list[Part]:
    """Only of a run whose world changed."""
    assert run.steps is not None
    steps = run.history.column("step")
    lines = [
        Series("workers", steps, run.history.column("world_size")),
        Series("ep", steps, run.history.column("ep")),
    ]
    if all(len(np.unique(line.values[np.isfinite(line.values)])) < 2 for line in lines):
        return []
    text = "Workers that train, and how many of them share one set of experts."
    spec = line_chart(lines, run.axis_marks, run.steps, y_title="ranks", zero=True, height=120)
    return [Figure("world", "World size", text, spec, series_table(lines))]
