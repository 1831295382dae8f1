"""Parallel coordinates: each trial a line through its settings, down to the objective.

The axes lie, so that their names and values are whole on a phone. Numbers have a logarithmic axis where they are
positive and span a factor of 8; other values stand side by side; a setting that a trial does not have stands
behind the end of the axis.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from moe_ray.analytics.report.curves import ROWS
from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.spec import short
from moe_ray.tuning.report.sweep import BEST, LOG_SPAN, Sweep, cell_of, cut, is_number, state_encoding, text_of

MOST_LINES = 400
_NOT_SET = 1.12
_ROW = 62
_MOST_VALUES = 8
# That an axis of a phone has room for.
_LETTERS = 40


def parallel_parts(sweep: Sweep) -> list[Part]:
    """The figure, or why there is none."""
    trials = sweep.measured[:MOST_LINES]
    if not trials:
        return [Missing("Settings and objective", "No trial has been evaluated yet.")]
    columns: dict[str, list[Any]] = {name: [trial.values.get(name) for trial in trials] for name in sweep.settings}
    columns[sweep.metric] = [sweep.objective(trial) for trial in trials]
    points: list[dict[str, Any]] = []
    ticks: list[dict[str, Any]] = []
    # The best is drawn last, over the others.
    for row, (name, values) in enumerate(columns.items()):
        place, marks = _axis(values)
        ticks += [{"row": row, "at": at, "label": label} for at, label in marks]
        for trial, value in reversed(list(zip(trials, values, strict=True))):
            shown = {"setting": name, "value": "not set" if value is None else text_of(value)}
            state = sweep.state(trial)
            points.append(
                {"row": row, "at": round(place(value), 4), "trial": trial.number, "state": state} | shown
            )
    text = (
        f"Each line is a trial; it crosses every setting at its value and ends at its newest {sweep.metric}. "
        f"Axes of numbers that span a factor of {LOG_SPAN} are logarithmic."
    )
    if len(trials) < len(sweep.measured):
        text += f" Of {len(sweep.measured):,} trials, the {MOST_LINES} best."
    rows = [
        (trial.number, *map(cell_of, values))
        for trial, *values in zip(trials[:ROWS], *columns.values(), strict=False)
    ]
    table = Table(
        ("trial", *columns), rows, note=f"The best {ROWS} of {len(trials)}." if len(trials) > ROWS else ""
    )
    spec = _spec(sweep, [*sweep.settings, sweep.axis_title], points, ticks)
    return [Figure("parallel", "Settings and objective", text, spec, table)]


def _spec(sweep: Sweep, names: Sequence[str], points: list[dict], ticks: list[dict]) -> dict[str, Any]:
    y = {
        "field": "row",
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [-0.6, len(names) - 0.3], "reverse": True, "nice": False},
    }
    last = _NOT_SET + 0.08 if any(tick["at"] > 1 for tick in ticks) else 1.03
    x = {"field": "at", "type": "quantitative", "axis": None, "scale": {"domain": [-0.03, last], "nice": False}}
    encoding = {"x": x, "y": y}
    look = state_encoding(sweep, sweep.measured[:MOST_LINES])
    is_best = {"test": f"datum.state == '{BEST}'"}
    lines = {
        "data": {"values": points},
        "mark": {"type": "line", "strokeJoin": "round"},
        "encoding": {
            **encoding,
            "color": look["color"],
            "detail": {"field": "trial"},
            "order": {"field": "row"},
            "opacity": {"condition": {**is_best, "value": 1}, "value": 0.45},
            "strokeWidth": {"condition": {**is_best, "value": 3.5}, "value": 1.2},
        },
    }
    tooltip = [{"field": name, "type": "nominal"} for name in ("trial", "state", "setting", "value")]
    dots = {
        "data": {"values": points},
        "mark": {"type": "point", "filled": True, "size": 36, "opacity": 1},
        "encoding": {**encoding, **look, "tooltip": tooltip},
    }
    axes = {"values": [{"row": row, "at": 0, "end": 1, "name": name} for row, name in enumerate(names)]}
    rule = {
        "data": axes,
        "mark": {"type": "rule", "color": "currentColor", "opacity": 0.4},
        "encoding": {**encoding, "x2": {"field": "end"}},
    }
    # No line passes below the last axis, and the best one ends at its beginning.
    dy = {"expr": f"datum.row == {len(names) - 1} ? 31 : -13"}
    title = {
        "name": "halo_titles",
        "data": axes,
        "mark": {"type": "text", "align": "left", "dy": dy, "fontSize": 12, "fontWeight": "bold", "limit": 300},
        "encoding": {**encoding, "text": {"field": "name"}},
    }
    # Labels of the ends of an axis stay within it.
    align = {"expr": "datum.at == 0 ? 'left' : datum.at == 1 ? 'right' : 'center'"}
    labels = {
        "name": "halo_labels",
        "data": {"values": ticks},
        "mark": {"type": "text", "align": align, "dy": 14, "fontSize": 11},
        "encoding": {**encoding, "text": {"field": "label"}},
    }
    return {
        "width": "container",
        "height": _ROW * len(names),
        "config": {"view": {"stroke": None}},
        "layer": [rule, lines, dots, title, labels],
    }


def _axis(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """Where values stand, from 0 to 1, and the labels of the axis."""
    known = [value for value in values if value is not None]
    if known and all(map(is_number, known)):
        place, marks = _numbers(known)
    else:
        place, marks = _categories(known)
    marks = _apart(marks)
    if len(known) < len(values):
        marks.append((_NOT_SET, "not set"))
    return lambda value: _NOT_SET if value is None else place(value), marks


def _numbers(known: Sequence[float]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    low, high = min(known), max(known)
    if low == high:
        return lambda value: 0.5, [(0.5, text_of(low))]
    is_log = low > 0 and high / low >= LOG_SPAN
    scale = math.log if is_log else float
    unscale = math.exp if is_log else float
    # By halves: the whole range may be more than a number can hold, or too little for two of them.
    span = scale(high) / 2 - scale(low) / 2

    def place(value: float) -> float:
        return (scale(value) / 2 - scale(low) / 2) / span if span else 0.5

    shown = sorted(set(known))
    if len(shown) > _MOST_VALUES:
        middle = short(unscale(scale(low) / 2 + scale(high) / 2), 2)
        return place, [(0, text_of(low)), (0.5, text_of(middle)), (1, text_of(high))]
    return place, [(place(value), text_of(value)) for value in shown]


def _categories(known: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    names = sorted({text_of(value) for value in known})
    places = {name: number / (len(names) - 1) if len(names) > 1 else 0.5 for number, name in enumerate(names)}
    letters = max(3, _LETTERS // max(1, len(names)) - 1)
    return lambda value: places[text_of(value)], [(at, cut(name, letters)) for name, at in places.items()]


def _apart(marks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """The labels of both ends, and of those between them each that meets no other on a phone."""
    kept: list[tuple[float, str]] = []
    taken: list[tuple[float, float]] = []
    for at, label in (*marks[:1], *marks[:0:-1]):
        width = (len(label) + 1) / _LETTERS
        start = at - width * (0 if at == 0 else 1 if at == 1 else 0.5)
        if all(start >= end or start + width <= begin for begin, end in taken):
            kept.append((round(at, 4), label))
            taken.append((start, start + width))
    return kept
