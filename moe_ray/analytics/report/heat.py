"""A heat map: cells of a grid in the colours of cividis, which read alike with any colour vision and in grey."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_ray.analytics.report.spec import short, step_axis

_MOST_LABELLED = 260
_MOST_COLUMNS_LABELLED = 12
_LETTER_PIXELS = 6
# What axis and margins leave of the narrowest one.
_PHONE_PIXELS = 310
# Of all layers together.
MOST_CELLS = 30_000
# More than colours can show.
_DIGITS = 3


def heat_map(
    values_YX: np.ndarray,
    y: tuple[str, Sequence[str | int]],
    x: tuple[str, Sequence[str | int]],
    value: str,
    *,
    top: float | None = None,
    number: str = ".2f",
) -> dict[str, Any]:
    """Cells with names on both axes, and their numbers in them where there is room.

    Args:
        values_YX: finite.
        y, x: title and labels of the rows and columns.
        value: title of the colours.
        top: value of the brightest colour; default: the largest.
        number: format of the numbers.
    """
    rows = [
        {"y": label, "v": [short(cell, _DIGITS) for cell in row]}
        for label, row in zip(y[1], values_YX.tolist(), strict=True)
    ]
    columns = [str(label) for label in x[1]]
    highest = top if top is not None else max(float(values_YX.max()), 1e-9)
    colour = _colour(value, highest)
    encoding = {
        "y": {"field": "y", "type": "ordinal", "title": y[0], "sort": None},
        "x": {"field": "x", "type": "ordinal", "title": x[0], "sort": columns, "axis": _label_axis(columns)},
    }
    tooltip = [
        {"field": "y", "type": "nominal", "title": y[0]},
        {"field": "x", "type": "nominal", "title": x[0]},
        {"field": "v", "type": "quantitative", "title": value, "format": number},
    ]
    layer = [{"mark": {"type": "rect"}, "encoding": {"color": colour, "tooltip": tooltip}}]
    if values_YX.size <= _MOST_LABELLED and len(columns) <= _MOST_COLUMNS_LABELLED:
        layer.append(_numbers(highest, number))
    return {
        "width": "container",
        "height": max(60, len(rows) * _row_height(len(rows))),
        "data": {"values": rows},
        "transform": _unfold("y", columns),
        "encoding": encoding,
        "layer": layer,
    }


def clearest_layers(scores: Mapping[int, float], cells: int) -> list[int]:
    """As many layers as a page has room for heat maps of `cells` cells, those of the highest score."""
    most = max(1, MOST_CELLS // cells)
    return sorted(sorted(scores, key=lambda layer: -scores[layer])[:most])


def heat_map_by_layer(
    values: Mapping[int, np.ndarray],
    chosen: int,
    y: tuple[str, Sequence[str | int]],
    x: tuple[str, Sequence[str | int]],
    value: str,
    top: float,
) -> dict[str, Any]:
    """A heat map of each layer, of which the reader chooses one; arguments as above."""
    parts = {layer: heat_map(values_YX, y, x, value, top=top) for layer, values_YX in values.items()}
    spec = parts[chosen]
    rows = [{"l": layer, **row} for layer, part in parts.items() for row in part["data"]["values"]]
    choice = {"name": "layer", "value": chosen, "bind": {"input": "select", "options": list(values)}}
    transform = [{"filter": "datum.l == layer"}, *spec["transform"]]
    return {**spec, "params": [choice], "data": {"values": rows}, "transform": transform}


def heat_map_over_time(
    values_MY: np.ndarray, steps_M: np.ndarray, y: tuple[str, Sequence[str | int]], value: str, top: float
) -> dict[str, Any]:
    """Cells over steps, each as wide as the time since the column before it.

    Args:
        values_MY: one column of the picture a row.
        steps_M: where the columns end.
        y: title and labels of the rows.
        value, top: as above.
    """
    starts = [max(0, int(2 * steps_M[0] - steps_M[1])) if len(steps_M) > 1 else 0, *steps_M[:-1].tolist()]
    columns = [
        {"a": start, "b": end, "v": [short(cell, _DIGITS) for cell in row]}
        for start, end, row in zip(starts, steps_M.tolist(), values_MY.tolist(), strict=True)
    ]
    return over_time_cells(columns, y, value, top, [])


def over_time_cells(
    columns: Sequence[Mapping[str, Any]],
    y: tuple[str, Sequence[str | int]],
    value: str,
    top: float,
    filters: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The same of columns `{"a": from, "b": to, "v": values}`, of which `filters` choose some."""
    labels = [str(label) for label in y[1]]
    encoding = {
        "x": step_axis("a"),
        "x2": {"field": "b"},
        "y": {"field": "x", "type": "ordinal", "title": y[0], "sort": labels},
        "color": _colour(value, top),
        "tooltip": [
            {"field": "x", "type": "nominal", "title": y[0]},
            {"field": "b", "type": "quantitative", "title": "step"},
            {"field": "v", "type": "quantitative", "title": value, "format": ".3~g"},
        ],
    }
    first, last = columns[0]["a"], columns[-1]["b"]
    return {
        "width": "container",
        "height": max(60, len(labels) * _row_height(len(labels))),
        "params": [{"name": "from", "value": first}, {"name": "to", "value": last}],
        "data": {"values": columns},
        "transform": [*filters, *_unfold("b", labels)],
        "mark": {"type": "rect", "clip": True},
        "encoding": encoding,
    }


def _unfold(row: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """From rows with lists to cells; the page carries only the numbers."""
    return [
        {"flatten": ["v"]},
        {"window": [{"op": "row_number", "as": "n"}], "groupby": [row]},
        {"calculate": "datum.n - 1", "as": "n"},
        {
            "lookup": "n",
            "from": {
                "data": {"values": [{"n": number, "x": label} for number, label in enumerate(labels)]},
                "key": "n",
                "fields": ["x"],
            },
        },
    ]


def _label_axis(labels: Sequence[str]) -> dict[str, Any]:
    """Upright where all labels, or enough of many, fit on a phone; slanted else, so that none is left out."""
    width = max(map(len, labels), default=0) * _LETTER_PIXELS * len(labels)
    if len(labels) > _MOST_COLUMNS_LABELLED or width < _PHONE_PIXELS:
        return {"labelAngle": 0}
    return {"labelAngle": -35, "labelOverlap": False}


def _colour(title: str, top: float) -> dict[str, Any]:
    scale = {"scheme": "cividis", "domain": [0, top], "clamp": True}
    return {"field": "v", "type": "quantitative", "title": title, "scale": scale}


def _numbers(top: float, number: str) -> dict[str, Any]:
    ink = {"condition": {"test": f"datum.v > {0.45 * top!r}", "value": "#000"}, "value": "#fff"}
    text = {"field": "v", "type": "quantitative", "format": number}
    return {"mark": {"type": "text", "fontSize": 10}, "encoding": {"text": text, "color": ink}}


def _row_height(count: int) -> float:
    return float(np.clip(640 / count, 2.5, 26))
