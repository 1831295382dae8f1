"""Routing while it trained: load of the experts, its imbalance and the router's entropy, by layer and over steps.

Shapes: M logged steps, L MoE layers, E experts.
"""

import math
from collections.abc import Sequence

import numpy as np

from moe_ray.analytics.report.curves import series_table
from moe_ray.analytics.report.heat import heat_map, heat_map_over_time, over_time_cells
from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.run import Run
from moe_ray.analytics.report.spec import Series, line_chart, short, was_thinned

_MOST_CELLS = 2_000
_MOST_CELLS_OVER_TIME = 60_000
# Of the balanced load: what lies above is as bright as it gets.
_BRIGHTEST_LOAD = 2.0


def balance_parts(run: Run) -> list[Part]:
    """Figures of the section on routing in training."""
    history = run.history
    if not history.by_layer or run.steps is None:
        return [Missing("Routing in training", "The run has not logged the load of experts yet.")]
    parts: list[Part] = [_worst(run)]
    if history.load_MLE is not None:
        parts += [_load_now(run, history.load_MLE[-1]), _load_over_time(run, history.load_MLE)]
    parts.append(_layers_over_time(run, "load_cv", "Load imbalance of each layer", "coefficient of variation"))
    if "routing_entropy" in history.by_layer:
        parts.append(
            _layers_over_time(run, "routing_entropy", "Entropy of the routers", "normalised entropy", top=1.0)
        )
    if "dead_experts" not in history.by_layer:
        parts.append(Missing("Experts without a token", "The run did not log them."))
    elif history.by_layer["dead_experts"].any():
        parts.append(_layers_over_time(run, "dead_experts", "Experts without a token", "dead experts", least=1.0))
    else:
        count = len(history.layers_M)
        reason = f"Nothing to draw: no expert went without a token in the {count} logged steps looked at."
        parts.append(Missing("Experts without a token", reason))
    if np.nanmax(history.column("dropped_fraction"), initial=0.0) > 0:
        parts.append(_dropped(run))
    return parts


def _worst(run: Run) -> Figure:
    assert run.steps is not None
    lines = [Series("load CV", run.history.column("step"), run.history.column("load_cv"))]
    text = (
        "Coefficient of variation of the experts' load in the worst layer of each logged step: 0 is balanced, "
        f"{_collapsed(run)} is collapse." + was_thinned(lines)
    )
    spec = line_chart(lines, run.axis_marks, run.steps, y_title="load CV", zero=True, height=140)
    return Figure("load-cv", "Load imbalance", text, spec, series_table(lines))


def _collapsed(run: Run) -> str:
    """The load CV where all tokens choose the same K of E experts: K loads of 1/K, the others 0."""
    if run.config is None or not run.config.model.is_known("num_experts"):
        return "the square root of (experts / choices of a token - 1)"
    num_experts, top_k = run.config.model.num_experts, run.config.model.top_k
    return f"{math.sqrt(num_experts / top_k - 1):.2f} (always the same {top_k} of {num_experts} experts)"


def _load_now(run: Run, load_LE: np.ndarray) -> Figure:
    relative_LE = load_LE * load_LE.shape[1]
    experts = range(load_LE.shape[1])
    spec = heat_map(
        relative_LE, ("layer", run.layers), ("expert", experts), "load over balanced", top=_BRIGHTEST_LOAD
    )
    step = int(run.history.column("step")[run.history.layers_M[-1]])
    text = (
        f"Load of each expert over the balanced one, at step {step}: 1 is its fair share, 0 a dead expert. "
        f"From {_BRIGHTEST_LOAD:g} on, cells are as bright as they get."
    )
    return Figure("load", "Load of each expert", text, spec, _load_table(run.layers, relative_LE))


def _load_table(layers: Sequence[int], relative_LE: np.ndarray) -> Table:
    num_experts = relative_LE.shape[1]
    if relative_LE.size <= _MOST_CELLS and num_experts <= 64:
        rows = [(layer, *map(short, row)) for layer, row in zip(layers, relative_LE.tolist(), strict=True)]
        return Table(("layer", *(f"expert {number}" for number in range(num_experts))), rows)
    rows = [
        (layer, short(row.min()), short(row.max()), int(row.argmax()), int((row == 0).sum()))
        for layer, row in zip(layers, relative_LE, strict=True)
    ]
    columns = ("layer", "least load", "largest load", "its expert", "dead experts")
    return Table(columns, rows, note=f"Summed up: the picture has {relative_LE.size:,} cells.")


def _load_over_time(run: Run, load_MLE: np.ndarray) -> Figure:
    count, num_layers, num_experts = load_MLE.shape
    shown = max(1, min(num_layers, _MOST_CELLS_OVER_TIME // max(1, count * num_experts)))
    unevenness_L = run.history.by_layer["load_cv"][-1]
    chosen = sorted(np.argsort(-unevenness_L, kind="stable")[:shown].tolist())
    worst = int(np.argmax(unevenness_L))
    steps = _kept_steps(run)
    starts = [0, *steps[:-1].tolist()]
    columns = [
        {"l": run.layers[layer], "a": start, "b": end, "v": [short(cell * num_experts, 3) for cell in cells]}
        for layer in chosen
        for start, end, cells in zip(starts, steps.tolist(), load_MLE[:, layer].tolist(), strict=True)
    ]
    y = ("expert", range(num_experts))
    of_layer = [{"filter": "datum.l == layer"}]
    spec = over_time_cells(columns, y, "load over balanced", _BRIGHTEST_LOAD, of_layer)
    options = [run.layers[layer] for layer in chosen]
    choice = {"name": "layer", "value": run.layers[worst], "bind": {"input": "select", "options": options}}
    spec["params"].append(choice)
    text = f"Load of each expert over the balanced one, in the layer chosen below the picture{_sampled(run)}."
    if shown < num_layers:
        text += f" Of {num_layers} layers, the {shown} with the least even load can be chosen."
    first, last = load_MLE[0, worst] * num_experts, load_MLE[-1, worst] * num_experts
    rows = [(number, short(first[number]), short(last[number])) for number in range(num_experts)]
    head = ("expert", f"step {steps[0]}", f"step {steps[-1]}")
    table = Table(head, rows, note=f"Of layer {run.layers[worst]}, whose load is least even.")
    return Figure("load-over-time", "Load of each expert over steps", text, spec, table)


def _layers_over_time(
    run: Run, name: str, title: str, value: str, *, top: float | None = None, least: float = 0.1
) -> Figure:
    values_ML = run.history.by_layer[name]
    finite_ML = np.nan_to_num(values_ML)
    brightest = top if top is not None else max(float(np.quantile(finite_ML, 0.98)), least)
    spec = heat_map_over_time(finite_ML, _kept_steps(run), ("layer", run.layers), value, brightest)
    text = {
        "load_cv": "Coefficient of variation of the experts' load: 0 is balanced",
        "routing_entropy": "Mean over tokens of the entropy of the router's distribution, over that of an even "
        "one: 1 is undecided, 0 certain",
        "dead_experts": "Number of experts that no token chose since the previous logged step",
    }[name]
    columns = ("layer", "first", "lowest", "highest", "last")
    rows = [
        (layer, short(row[0]), short(row.min()), short(row.max()), short(row[-1]))
        for layer, row in zip(run.layers, finite_ML.T, strict=True)
    ]
    return Figure(
        name.replace("_", "-") + "-by-layer", title, f"{text}{_sampled(run)}.", spec, Table(columns, rows)
    )


def _dropped(run: Run) -> Figure:
    assert run.steps is not None
    lines = [Series("dropped", run.history.column("step"), run.history.column("dropped_fraction"))]
    text = "Share of the routed tokens that no expert had room for." + was_thinned(lines)
    spec = line_chart(lines, run.axis_marks, run.steps, y_title="dropped share", zero=True, height=120)
    return Figure("dropped", "Dropped tokens", text, spec, series_table(lines))


def _kept_steps(run: Run) -> np.ndarray:
    return run.history.column("step")[run.history.layers_M].astype(int)


def _sampled(run: Run) -> str:
    kept, logged = len(run.history.layers_M), len(run.history)
    return "" if kept == logged else f"; {kept} of {logged:,} logged steps, evenly spread"
