"""When a run trained: its steps over time of day, and what happened to it."""

import math

import numpy as np

from moe_ray.analytics.report.events import QUIET, Restart, utc
from moe_ray.analytics.report.parts import Cell, Figure, Missing, Part, Table
from moe_ray.analytics.report.run import Run
from moe_ray.analytics.report.spec import COLOURS, apart

_MOST_POINTS = 500
_MOST_EVENTS = 300
_DAY_SECONDS = 86_400
# A chart has up to ten labels.
_SHORT_SECONDS = 1200


def event_parts(run: Run) -> list[Part]:
    """The section on events."""
    if run.steps is None and not run.marks:
        return [Missing("Events", "Nothing was noted yet.")]
    parts: list[Part] = [_timeline(run)] if run.steps is not None else []
    if not run.marks and not run.restarts:
        return [*parts, Missing("Events", "None: there is no events.jsonl, and the steps show no restart.")]
    return [*parts, event_table(run, "event-table")]


def _timeline(run: Run) -> Figure:
    times, steps = run.history.column("time"), run.history.column("step")
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_POINTS)).round().astype(int))
    line = [{"time": round(times[row] * 1000), "step": int(steps[row])} for row in kept if np.isfinite(times[row])]
    marks = [
        {"time": round(mark.time * 1000), "step": mark.step, "letter": mark.letter, "event": mark.text}
        for mark in run.marks[:_MOST_EVENTS]
        if mark.time is not None and mark.kind not in QUIET
    ]
    noted = [mark.time for mark in run.marks if mark.time is not None]
    moments = np.array([*times[np.isfinite(times)].tolist(), *noted])
    span = float(np.ptp(moments)) if len(moments) else 0.0
    axis = {"format": "%H:%M:%S" if span < _SHORT_SECONDS else "%H:%M" if span < _DAY_SECONDS else "%m-%d %H:%M"}
    x = {"field": "time", "type": "temporal", "title": "UTC", "scale": {"type": "utc"}, "axis": axis}
    y = {"field": "step", "type": "quantitative", "title": "step", "scale": {"zero": True}}
    when = {"field": "time", "type": "temporal", "title": "UTC", "format": "%Y-%m-%d %H:%M:%S"}
    tooltip = [when, {"field": "event", "type": "nominal"}]
    rule = {"type": "rule", "strokeDash": [3, 3], "opacity": 0.6, "color": "currentColor"}
    letter = {"type": "text", "baseline": "bottom", "dy": -3, "fontWeight": "bold", "color": "currentColor"}
    above = {"x": x, "y": {"value": 0}, "text": {"field": "letter"}, "tooltip": tooltip}
    lines = {"type": "line", "color": COLOURS[0], "point": {"size": 12}}
    events = {"data": {"values": marks}}
    layers = [{"data": {"values": line}, "mark": lines, "encoding": {"x": x, "y": y}}]
    if marks:
        layers.append({**events, "mark": rule, "encoding": {"x": x, "tooltip": tooltip}})
        letters = {"values": apart(marks, "time", span * 1000)}
        layers.append({"data": letters, "mark": letter, "encoding": above})
    text = (
        "Logged steps over time, without those that were lost and done again: where the line is flat, nothing "
        "that lasted was done. Letters: S start, F failure, D notice of a node, R restart asked for, Z change of "
        "the number of workers, E asked to end, A alert, a its end."
    )
    spec = {"width": "container", "height": 200, "layer": layers}
    rows = [(run.steps[0] if run.steps else None, run.steps[1] if run.steps else None, len(run.restarts))]
    return Figure("timeline", "Steps over time", text, spec, Table(("first step", "last step", "restarts"), rows))


def event_table(run: Run, id: str) -> Table:
    """All events and restarts, with the id that it has in the page."""
    timed: list[tuple[float, tuple[Cell, ...]]] = [
        (mark.time or 0.0, (mark.step, mark.letter, mark.when, mark.text)) for mark in run.marks
    ]
    timed += [
        (restart.time, (restart.step, "", utc(restart.time), _went_on(run, restart)))
        for restart in run.restarts
        if restart.redone is not None
    ]
    rows = [row for _, row in sorted(timed, key=lambda item: item[0])]
    note = "A step is the last one that was logged, and kept, before the event."
    if len(rows) > _MOST_EVENTS:
        note += f" The first {_MOST_EVENTS} of {len(rows):,}."
    return Table(("step", "letter", "UTC", "event"), rows[:_MOST_EVENTS], "What happened", note, id)


def _went_on(run: Run, restart: Restart) -> str:
    text = f"went on from step {restart.step}; {restart.told(run.log_every)}"
    return text if math.isnan(restart.restore_seconds) else f"{text}; loading took {restart.restore_seconds:.1f} s"
