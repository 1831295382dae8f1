"""Several runs in one picture each."""

from collections.abc import Mapping, Sequence

import numpy as np

from moe_ray.analytics.report.curves import series_table
from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.run import Run
from moe_ray.analytics.report.spec import COLOURS, Series, by_name, line_chart, short, was_thinned
from moe_ray.analytics.report.speed import phase_shares

# Column, title, axis, and its scale: from 0, from the lowest value, or logarithmic.
_CURVES = (
    ("loss", "Training loss", "loss (nats)", "lowest"),
    ("val_perplexity", "Held-out perplexity", "perplexity", "log"),
    ("tokens_per_second", "Throughput", "tokens/s", "zero"),
    ("load_cv", "Load imbalance of the worst layer", "load CV", "zero"),
    ("routing_entropy", "Entropy of the routers", "normalised entropy", "lowest"),
)


def comparison_parts(runs: Sequence[Run], steps: tuple[int, int] | None) -> list[Part]:
    """Curves over each other, where the time goes, and the last values."""
    if steps is None:
        return [Missing("Comparison", "None of the runs has logged a step yet.")]
    curves = [_curve(runs, steps, *curve) for curve in _CURVES]
    return [_last_values(runs), *curves, *_time_shares(runs), *_without_evaluation(runs)]


def differing_settings(flat: Sequence[Mapping[str, str]], runs: Sequence[Run]) -> Table:
    """Settings that are not equal in all runs."""
    names = sorted({name for settings in flat for name in settings})
    rows = [
        (name, *(settings.get(name, "") for settings in flat))
        for name in names
        if len({settings.get(name) for settings in flat}) > 1
    ]
    note = f"{len(names) - len(rows)} settings are equal and not listed."
    return Table(("setting", *(run.name for run in runs)), rows, "Settings that differ", note)


def _curve(runs: Sequence[Run], steps: tuple[int, int], column: str, title: str, y_title: str, start: str) -> Part:
    lines = [Series(run.name, run.history.column("step"), run.history.column(column)) for run in runs]
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return Missing(title, f"No run has logged {column}.")
    text = f"{title} of {', '.join(line.name for line in lines)}." + was_thinned(lines)
    spec = line_chart(lines, [], steps, y_title=y_title, log=start == "log", zero=start == "zero")
    return Figure(f"compare-{column.replace('_', '-')}", title, text, spec, series_table(lines))


def _last_values(runs: Sequence[Run]) -> Table:
    columns = ("step", "tokens", "loss", "val_perplexity", "tokens_per_second", "load_cv", "routing_entropy")
    rows = [
        (run.name, *(None if (value := run.history.last(name)) is None else short(value) for name in columns))
        for run in runs
    ]
    head = ("run", "step", "tokens", "loss", "held-out perplexity", "tokens/s", "load CV", "entropy")
    restarts = ((*row, len(run.restarts)) for row, run in zip(rows, runs, strict=True))
    return Table((*head, "restarts"), list(restarts), "Last values", id="last-values")


def _time_shares(runs: Sequence[Run]) -> list[Part]:
    shares = {run.name: phase_shares(run) for run in runs}
    names = list(dict.fromkeys(name for of_run in shares.values() for name in of_run))
    if not names:
        return []
    values = [
        {"run": run, "phase": name, "share": short(share), "order": names.index(name), "label": f"{share:.0%}"}
        for run, of_run in shares.items()
        for name, share in of_run.items()
    ]
    encoding = {
        "y": {"field": "run", "type": "nominal", "sort": None, "title": None},
        "x": {
            "field": "share",
            "type": "quantitative",
            "title": "share of a step",
            "axis": {"format": "%"},
            "scale": {"domainMax": 1},
        },
        "order": {"field": "order", "type": "quantitative"},
    }
    colour = {"field": "phase", "type": "nominal", "title": None, "sort": names, "scale": by_name(names, COLOURS)}
    tooltip = [{"field": name, "type": "nominal"} for name in ("run", "phase", "label")]
    bar = {"type": "bar", "stroke": "currentColor", "strokeWidth": 0.5}
    spec = {
        "width": "container",
        "height": 34 * len(shares),
        "data": {"values": values},
        "mark": bar,
        "encoding": {**encoding, "color": colour, "tooltip": tooltip},
    }
    text = f"Share of each phase in the time of a step, stacked in this order: {', '.join(names)}."
    rows = [(run, *(short(of_run.get(name, 0.0)) for name in names)) for run, of_run in shares.items()]
    table = Table(("run", *names), rows)
    return [Figure("compare-time", "Where the time of a step goes", text, spec, table)]


def _without_evaluation(runs: Sequence[Run]) -> list[Part]:
    names = [run.name for run in runs if run.history.last("val_perplexity") is None]
    if not names:
        return []
    return [Missing("Held-out perplexity of all runs", f"These have not evaluated: {', '.join(names)}.")]
