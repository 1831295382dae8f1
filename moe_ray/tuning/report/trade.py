"""What a sweep cost and what it bought: the Pareto front of loss against FLOPs, and all learning curves."""

import math
from collections.abc import Sequence
from typing import Any

from moe_ray.analytics.report.curves import ROWS
from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.spec import COLOURS, over_time, short, step_axis
from moe_ray.tuning.report.sweep import BEST, LOG_SPAN, STOPPED, Sweep, count_axis, counted, state_encoding
from moe_ray.tuning.trials import Trial

_MOST_CURVES = 200
_MOST_POINTS = 100


def pareto_front(sweep: Sweep) -> list[Trial]:
    """Finished trials that no other one beats in both objective and FLOPs a token, the cheapest first."""
    front: list[Trial] = []
    for trial in sorted(_finished(sweep), key=lambda trial: (trial.flops_per_token, sweep.loss(trial))):
        if not front or sweep.loss(trial) < sweep.loss(front[-1]):
            front.append(trial)
    return front


def pareto_parts(sweep: Sweep) -> list[Part]:
    """The figure, or why there is none."""
    title = f"{sweep.metric} against FLOPs a token"
    trials = _finished(sweep)
    costs = [trial.flops_per_token or 0.0 for trial in trials]
    if not trials:
        return [Missing(title, "No trial has finished yet.")]
    if min(costs) == max(costs):
        told = f"{short(costs[0], 3):.3g} FLOPs a token: there is nothing to weigh."
        return [Missing(title, f"{'Every' if len(trials) > 1 else 'The only'} finished trial takes {told}")]
    front = pareto_front(sweep)
    x = count_axis("flops", "training FLOPs a token", log=max(costs) / min(costs) >= LOG_SPAN)
    y = {"field": "value", "type": "quantitative", "title": sweep.axis_title, "scale": {"zero": False}}
    tooltip = [{"field": name, "type": "nominal"} for name in ("trial", "state", "value", "flops")]
    line = {
        "data": {"values": [_point(sweep, trial) for trial in front]},
        "mark": {"type": "line", "interpolate": "step-after", "color": COLOURS[1], "strokeDash": [5, 3]},
        "encoding": {"x": x, "y": y},
    }
    # The best is drawn last, over the others.
    points = {
        "data": {"values": [_point(sweep, trial) for trial in reversed(trials)]},
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1},
        "encoding": {"x": x, "y": y, **state_encoding(sweep, trials), "tooltip": tooltip},
    }
    spec = {"width": "container", "height": 260, "layer": [line, points]}
    beyond = "upper" if sweep.lowest else "lower"
    text = (
        "Each point is a finished trial. The dashed line joins those that no other one beats in both: to its "
        f"{beyond} right lies what costs more and is worse."
    )
    rows = [
        (
            trial.number,
            short(sweep.objective(trial) or 0.0),
            trial.flops_per_token,
            trial.active_parameters,
            trial.parameters,
        )
        for trial in front
    ]
    head = ("trial", sweep.metric, "FLOPs a token", "active parameters", "parameters")
    return [Figure("pareto", title, text, spec, Table(head, rows, note="Trials of the front."))]


def curve_parts(sweep: Sweep) -> list[Part]:
    """Learning curves of all trials, or why there are none."""
    title = f"{sweep.metric} over steps"
    steps, trials = sweep.step_range, [trial for trial in sweep.trials if trial.history]
    if steps is None:
        return [Missing(title, "No trial has been evaluated yet.")]
    if all(len(trial.history) == 1 for trial in trials):
        return [Missing(title, "Each trial was evaluated once, at its end.")]
    drawn = sorted(trials, key=sweep.loss)[:_MOST_CURVES]
    values = [
        {"step": step, "value": short(value), "trial": trial.number, "state": sweep.state(trial), "last": is_last}
        for trial in reversed(drawn)
        for step, value, is_last in _thinned(trial.history)
    ]
    y = {"field": "value", "type": "quantitative", "title": sweep.axis_title, "scale": {"zero": False}}
    look = state_encoding(sweep, drawn)
    is_best = {"test": f"datum.state == '{BEST}'"}
    encoding = {"x": step_axis(), "y": y, "color": look["color"]}
    tooltip = [{"field": name, "type": "nominal"} for name in ("trial", "state", "step", "value")]
    lines = {
        "mark": {"type": "line"},
        "encoding": {
            **encoding,
            "detail": {"field": "trial"},
            "opacity": {"condition": {**is_best, "value": 1}, "value": 0.6},
            "strokeWidth": {"condition": {**is_best, "value": 3}, "value": 1.3},
            "strokeDash": {"condition": {"test": f"datum.state == '{STOPPED}'", "value": [4, 2]}, "value": [1, 0]},
        },
    }
    ends = {
        "transform": [{"filter": "datum.last"}],
        "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
        "encoding": {**encoding, "shape": look["shape"], "tooltip": tooltip},
    }
    shown = [{"filter": "isValid(datum.value) && datum.step >= from && datum.step <= to"}]
    layer = {"data": {"values": values}, "transform": shown, "layer": [lines, ends]}
    spec = over_time([layer], [], steps, 280)
    text = f"{sweep.metric} at each evaluation. {saved_text(sweep)}"
    if len(drawn) < len(trials):
        text += f" Of {len(trials):,} trials, the {_MOST_CURVES} best."
    rows = [
        (trial.number, trial.status, trial.steps, len(trial.history), short(trial.history[-1][1]))
        for trial in drawn
    ]
    table = Table(
        ("trial", "status", "steps", "evaluations", "last value"),
        rows[:ROWS],
        note=f"The best {ROWS}." if len(rows) > ROWS else "",
    )
    return [Figure("curves", title, text, spec, table)]


def saved_text(sweep: Sweep) -> str:
    """What stopping trials early saved."""
    used, started = sum(trial.steps for trial in sweep.trials), [trial for trial in sweep.trials if trial.steps]
    stopped = sum(trial.status == "stopped" for trial in started)
    whole = len(started) * sweep.steps
    if not stopped or not whole:
        return "No trial was stopped early."
    were = "was" if stopped == 1 else "were"
    return (
        f"{stopped} of {counted(len(started), 'trial')} {were} stopped early (dashed, crosses). Steps trained: "
        f"{used:,}, {used / whole:.0%} of the {whole:,} that all of them to the end would have taken."
    )


def _finished(sweep: Sweep) -> list[Trial]:
    """Finished trials within the bounds whose size is known, the best first."""
    return [
        trial
        for trial in sweep.measured
        if trial.status == "finished" and trial.flops_per_token and sweep.is_within(trial)
    ]


def _point(sweep: Sweep, trial: Trial) -> dict[str, Any]:
    value = short(sweep.objective(trial) or 0.0)
    return {"flops": trial.flops_per_token, "value": value, "trial": trial.number, "state": sweep.state(trial)}


def _thinned(history: Sequence[tuple[int, float]]) -> list[tuple[int, float, bool]]:
    """At most so many points, the last among them."""
    every = math.ceil(len(history) / _MOST_POINTS)
    kept = list(reversed(history[::-1][::every]))
    return [(step, value, step == history[-1][0]) for step, value in kept]
