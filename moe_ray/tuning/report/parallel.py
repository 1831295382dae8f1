"""Parallel coordinates: each trial a line through its settings, down to the objective.

The axes lie, so that their names and values are whole on a phone. Numbers have a logarithmic axis where they are
positive and span a factor of 20; other values stand side by side; a setting that a trial does not have stands
behind the end of the axis.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.spec import short
from moe_ray.tuning.report.sweep import BEST, Sweep, is_number, label_of, state_encoding, text_of

MOST_LINES = 400
_NOT_SET = 1.12
_LOG_SPAN = 20
_ROW = 62
_MOST_LABELS = 9


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
        f"Each line is a trial; it crosses every setting at its value and ends at its {sweep.metric}. Axes of "
        f"numbers that span a factor of {_LOG_SPAN} are logarithmic."
    )
    if len(trials) < len(sweep.measured):
        text += f" Of {len(sweep.measured):,} trials, the {MOST_LINES} best."
    rows = [
        (trial.number, *(text_of(columns[name][place]) for name in columns)) for place, trial in enumerate(trials)
    ]
    table = Table(("trial", *columns), rows[:25], note="" if len(rows) <= 25 else f"The best 25 of {len(rows)}.")
    return [Figure("parallel", "Settings and objective", text, _spec(sweep, list(columns), points, ticks), table)]


def _spec(sweep: Sweep, names: Sequence[str], points: list[dict], ticks: list[dict]) -> dict[str, Any]:
    y = {
        "field": "row",
        "type": "quantitative",
        "axis": None,
        "scale": {"domain": [-0.6, len(names) - 0.5], "reverse": True, "nice": False},
    }
    x = {"field": "at", "type": "quantitative", "axis": None, "scale": {"domain": [-0.03, 1.2], "nice": False}}
    encoding = {"x": x, "y": y}
    look = state_encoding(sweep)
    lines = {
        "data": {"values": points},
        "mark": {"type": "line", "strokeJoin": "round"},
        "encoding": {
            **encoding,
            "color": look["color"],
            "detail": {"field": "trial"},
            "order": {"field": "row"},
            "opacity": {"condition": {"test": f"datum.state == '{BEST}'", "value": 1}, "value": 0.45},
            "strokeWidth": {"condition": {"test": f"datum.state == '{BEST}'", "value": 3.5}, "value": 1.2},
        },
    }
    tooltip = [{"field": name, "type": "nominal"} for name in ("trial", "state", "setting", "value")]
    dots = {
        "data": {"values": points},
        "mark": {"type": "point", "filled": True, "size": 36},
        "encoding": {**encoding, **look, "tooltip": tooltip},
    }
    axes = {"values": [{"row": row, "at": 0, "end": 1, "name": name} for row, name in enumerate(names)]}
    rule = {
        "data": axes,
        "mark": {"type": "rule", "color": "currentColor", "opacity": 0.4},
        "encoding": {**encoding, "x2": {"field": "end"}},
    }
    title = {
        "data": axes,
        "mark": {"type": "text", "align": "left", "dy": -13, "fontWeight": "bold", "limit": 300},
        "encoding": {**encoding, "text": {"field": "name"}},
    }
    labels = [_labels(ticks, encoding, align, test) for align, test in _ALIGNED]
    return {
        "width": "container",
        "height": _ROW * len(names),
        "config": {"view": {"stroke": None}},
        "layer": [rule, lines, dots, title, *labels],
    }


# Labels of the ends of an axis stay within it.
_ALIGNED = (
    ("left", "datum.at == 0"),
    ("center", "datum.at > 0 && datum.at < 1"),
    ("right", "datum.at == 1"),
    ("center", "datum.at > 1"),
)


def _labels(ticks: list[dict], encoding: dict[str, Any], align: str, test: str) -> dict[str, Any]:
    return {
        "data": {"values": ticks},
        "transform": [{"filter": test}],
        "mark": {"type": "text", "align": align, "dy": 14, "fontSize": 10},
        "encoding": {**encoding, "text": {"field": "label"}},
    }


def _axis(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """Where values stand, from 0 to 1, and the labels of the axis."""
    known = [value for value in values if value is not None]
    if known and all(map(is_number, known)):
        place, marks = _numbers(known)
    else:
        place, marks = _categories(known)
    if len(known) < len(values):
        marks.append((_NOT_SET, "not set"))
    return lambda value: _NOT_SET if value is None else place(value), marks


def _numbers(known: Sequence[float]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    low, high = min(known), max(known)
    if low == high:
        return lambda value: 0.5, [(0.5, label_of(low))]
    is_log = low > 0 and high / low >= _LOG_SPAN
    scale = math.log if is_log else float
    unscale = math.exp if is_log else float

    def place(value: float) -> float:
        return (scale(value) - scale(low)) / (scale(high) - scale(low))

    distinct = sorted(set(known))
    if len(distinct) <= 5:
        return place, [(round(place(value), 4), label_of(value)) for value in distinct]
    middle = short(unscale((scale(low) + scale(high)) / 2), 2)
    return place, [(0, label_of(low)), (0.5, label_of(middle)), (1, label_of(high))]


def _categories(known: Sequence[Any]) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    names = sorted({text_of(value) for value in known})
    places = {name: number / (len(names) - 1) if len(names) > 1 else 0.5 for number, name in enumerate(names)}
    # Labels share the width of a phone.
    letters = max(3, 44 // max(1, len(names)))
    marks = [
        (round(at, 4), name if len(name) <= letters else f"{name[: letters - 1]}…") for name, at in places.items()
    ]
    return lambda value: places[text_of(value)], marks if len(marks) <= _MOST_LABELS else [marks[0], marks[-1]]
