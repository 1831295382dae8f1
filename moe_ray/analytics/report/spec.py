"""Pieces of Vega-Lite that several figures use: colours, axes of steps, lines, marks of events."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_ray.analytics.report.events import Mark

# Okabe and Ito (2008), darkest first: told apart with any colour vision. Dashes and shapes do without any; there
# is one dash less, so that colour and dash together tell 56 lines apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
DASHES = ((1, 0), (6, 3), (2, 2), (8, 2, 2, 2), (12, 3), (4, 1), (1, 3))
SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-left",
    "triangle-right",
)
MOST_POINTS = 500
_FEW_POINTS = 30
_CLOSE = 0.06


@dataclass(frozen=True)
class Series:
    """One line of a chart: values [N] at steps [N]; NaN where there is none."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def short(value: float, digits: int = 5) -> float | None:
    """With so many significant digits that no picture shows more; None if it is not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def thin(series: Series, most: int = MOST_POINTS) -> list[dict[str, Any]]:
    """Points of a line: all of them, or means of equally many neighbours with their lowest and highest value."""
    known = np.isfinite(series.values)
    steps, values = series.steps[known], series.values[known]
    if len(steps) <= most:
        pairs = zip(steps.tolist(), values.tolist(), strict=True)
        return [{"step": step, "value": short(value), "series": series.name} for step, value in pairs]
    points = []
    for part in np.array_split(np.arange(len(steps)), most):
        step, mean = float(steps[part].mean()), short(values[part].mean())
        low, high = short(values[part].min()), short(values[part].max())
        points.append({"step": step, "value": mean, "low": low, "high": high, "series": series.name})
    return points


def was_thinned(lines: Sequence[Series]) -> str:
    """A sentence for the reader, if lines have more points than are drawn."""
    most = max((int(np.isfinite(line.values).sum()) for line in lines), default=0)
    if most <= points_of(len(lines)):
        return ""
    each = most // points_of(len(lines))
    return f" Of {most:,} logged steps, each point is the mean of about {each}, with their range."


def points_of(lines: int) -> int:
    """Points of each line, which many lines share."""
    return max(50, min(MOST_POINTS, 4000 // lines))


def step_axis(field: str = "step") -> dict[str, Any]:
    """The horizontal axis of all charts over time; the page moves `from` and `to` of all of them."""
    scale = {"domain": [{"expr": "from"}, {"expr": "to"}], "nice": False}
    return {"field": field, "type": "quantitative", "title": "step", "scale": scale}


def over_time(layers: Sequence[Mapping[str, Any]], marks: Sequence[Mark], steps: tuple[int, int], height: int):
    """A chart over steps, with the events of the run above it."""
    params = [{"name": "from", "value": steps[0]}, {"name": "to", "value": steps[1]}]
    layer = [*layers, *_event_layers(marks, steps)]
    return {"width": "container", "height": height, "params": params, "layer": layer}


def line_chart(
    lines: Sequence[Series],
    marks: Sequence[Mark],
    steps: tuple[int, int],
    *,
    y_title: str,
    log: bool = False,
    zero: bool = False,
    height: int = 240,
) -> dict[str, Any]:
    """Lines over steps, told apart by colour, dash and, where there are few points, shape."""
    values = [point for line in lines for point in thin(line, points_of(len(lines)))]
    names = [line.name for line in lines]
    scale = {"type": "log", "nice": False} if log else {"zero": zero}
    y = {"field": "value", "type": "quantitative", "title": y_title, "scale": scale}
    colour = {"field": "series", "type": "nominal", "title": None, "scale": by_name(names, COLOURS)}
    dash = {"field": "series", "type": "nominal", "title": None, "scale": by_name(names, DASHES)}
    shape = {"field": "series", "type": "nominal", "title": None, "scale": by_name(names, SHAPES)}
    if len(lines) == 1:
        colour, dash, shape = {"value": COLOURS[0]}, {"value": [1, 0]}, {"value": "circle"}
    sparse = [line.name for line in lines if np.isfinite(line.values).sum() <= _FEW_POINTS]
    hover = {
        "name": "near",
        "select": {"type": "point", "on": "pointermove", "nearest": True, "clear": "pointerout"},
    }
    near = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    near["condition"] = [near["condition"], {"test": {"field": "series", "oneOf": sparse}, "value": 1}]
    tooltip = [
        {"field": "step", "type": "quantitative"},
        {"field": "value", "type": "quantitative", "title": y_title},
    ]
    if len(lines) > 1:
        tooltip.insert(0, {"field": "series", "type": "nominal"})
    line = {
        "mark": {"type": "line", "strokeWidth": 1.8},
        "encoding": {"x": step_axis(), "y": y, "color": colour, "strokeDash": dash},
    }
    points = {
        "params": [hover],
        "mark": {"type": "point", "filled": True, "size": 50},
        "encoding": {
            "x": step_axis(),
            "y": y,
            "color": colour,
            "shape": shape,
            "opacity": near,
            "tooltip": tooltip,
        },
    }
    layers = [line, points]
    if any("low" in point for point in values):
        band = {"x": step_axis(), "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour}
        mark = {"type": "area", "opacity": 0.25}
        layers.insert(0, {"transform": [{"filter": "isValid(datum.low)"}], "mark": mark, "encoding": band})
    shown = [{"filter": "datum.step >= from && datum.step <= to"}]
    return over_time([{"data": {"values": values}, "transform": shown, "layer": layers}], marks, steps, height)


def by_name(names: Sequence[str], range_: Sequence[Any]) -> dict[str, Any]:
    """A scale from names to colours, dashes or shapes, used again from the start when they run out."""
    return {"domain": list(names), "range": [range_[number % len(range_)] for number in range(len(names))]}


def apart(values: Sequence[Mapping[str, Any]], field: str, span: float) -> list[dict[str, Any]]:
    """Events with those too close to be read apart on a phone as one: all letters, and all that they say.

    Args:
        field: where an event stands on its axis.
        span: of the axis.
    """
    groups: list[list[Mapping[str, Any]]] = []
    for value in sorted(values, key=lambda value: value[field]):
        if groups and value[field] - groups[-1][0][field] < _CLOSE * span:
            groups[-1].append(value)
        else:
            groups.append([value])
    return [
        {
            **group[0],
            "letter": "".join(dict.fromkeys("".join(value["letter"] for value in group))),
            "event": "; ".join(dict.fromkeys(value["event"] for value in group)),
        }
        for group in groups
    ]


def _event_layers(marks: Sequence[Mark], steps: tuple[int, int]) -> list[dict[str, Any]]:
    if not marks:
        return []
    values = [{"step": mark.step, "letter": mark.letter, "event": mark.text} for mark in marks]
    letters = apart(values, "step", steps[1] - steps[0])
    tooltip = [{"field": "event", "type": "nominal"}, {"field": "step", "type": "quantitative"}]
    shown = [{"filter": "datum.step >= from && datum.step <= to"}]
    rule = {"type": "rule", "strokeDash": [3, 3], "opacity": 0.6, "color": "currentColor"}
    letter = {"type": "text", "baseline": "bottom", "dy": -3, "fontWeight": "bold", "color": "currentColor"}
    text = {"x": step_axis(), "y": {"value": 0}, "text": {"field": "letter"}, "tooltip": tooltip}
    return [
        {
            "data": {"values": values},
            "transform": shown,
            "mark": rule,
            "encoding": {"x": step_axis(), "tooltip": tooltip},
        },
        {"data": {"values": letters}, "transform": shown, "mark": letter, "encoding": text},
    ]
