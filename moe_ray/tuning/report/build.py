"""`sweep.html`: one page on a sweep, which loads nothing from anywhere."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from moe_ray.analytics.report.page import render
from moe_ray.analytics.report.parts import Cell, Figure, Finding, Missing, Page, Part, Section, Table
from moe_ray.analytics.report.spec import short
from moe_ray.storage import Storage
from moe_ray.telemetry.samples import EVALUATED
from moe_ray.tuning.changes import Change
from moe_ray.tuning.report.cost import cost_parts
from moe_ray.tuning.report.findings import findings_of, reasons_of
from moe_ray.tuning.report.importance import importance_parts
from moe_ray.tuning.report.parallel import parallel_parts
from moe_ray.tuning.report.sweep import Sweep, cell_of, counted, is_number, text_of
from moe_ray.tuning.report.trade import curve_parts, pareto_parts
from moe_ray.tuning.trials import Trial

SWEEP_PAGE = "sweep.html"
# What trials are compared by, next to the objective and what has bounds.
_METRICS = ("loss", "val_loss", "val_perplexity", "load_cv", "dead_experts", "tokens_per_second", "memory_bytes")


def write_sweep_page(
    storage: Storage, sweep: Sweep, sections: Sequence[Section] = (), findings: Sequence[Finding] = ()
) -> None:
    """Write the page into the sweep's folder, whole or not at all.

    Args:
        sections, findings: of what else was made of the trials than a best one; they come first.

    Raises:
        StorageError: it cannot be written.
    """
    storage.write(SWEEP_PAGE, render(sweep_page(sweep, sections, findings)))


def sweep_page(sweep: Sweep, sections: Sequence[Section] = (), findings: Sequence[Finding] = ()) -> Page:
    """The page."""
    curves = curve_parts(sweep)
    parts = [
        *(sections or [Section("best", "Best trial", [_best(sweep)])]),
        Section("settings", "Settings", [*parallel_parts(sweep), *importance_parts(sweep)]),
        Section("cost", "Loss and cost", [*cost_parts(sweep), *pareto_parts(sweep)]),
        Section("learning", "Learning curves", curves),
        Section("trials", "Trials", [*_reasons(sweep), *_changes(sweep), _trials(sweep)]),
    ]
    which = "lowest" if sweep.lowest else "highest"
    searched = ", ".join(sweep.settings) or "no setting"
    within = "".join(f", with {bound.metric} {bound.relation} {bound.bound:g}" for bound in sweep.bounds)
    trials = counted(len(sweep.trials), "trial")
    if len(sweep.trials) < sweep.most and any(trial.status in ("pending", "running") for trial in sweep.trials):
        trials += f" so far, of at most {sweep.most}"
    lead = f"A sweep of {trials} for the {which} {sweep.metric}{within}, over {searched}."
    if sweep.metric in EVALUATED and sweep.held_out_tokens:
        lead += f" Trials are evaluated on at most {sweep.held_out_tokens:,} held-out tokens, the same for all."
    steps = sweep.step_range if any(isinstance(part, Figure) for part in curves) else None
    return Page(sweep.name, lead, [*findings, *findings_of(sweep)], parts, steps)


def _best(sweep: Sweep) -> Part:
    best, base = sweep.best, sweep.as_configured
    if best is None:
        return Missing("Best trial", "No trial has finished within the constraints yet.")
    sides = [(f"trial {best.number}", best.values, best.metrics)]
    if sweep.configured is not None and base != best:
        name = "as configured" if base is None else f"as configured (trial {base.number})"
        sides.append((name, sweep.configured, {} if base is None else base.metrics))
    settings = dict.fromkeys(name for _, values, _ in sides for name in values)
    metrics = [name for name in _compared(sweep, *_METRICS) if name in best.metrics]
    rows = [(name, *(_text(values, name) for _, values, _ in sides)) for name in settings]
    rows += [(name, *(_text(numbers, name) for _, _, numbers in sides)) for name in metrics]
    note = (
        f"Run {best.run}, {counted(best.steps, 'step')}, seed {best.seed}; what another seed would change is not "
        "known. jobs/train.py takes best.yaml beside this page; metrics.jsonl of the run has all numbers."
    )
    head = ("setting or metric", *(name for name, _, _ in sides))
    return Table(head, rows, f"Trial {best.number}", note)


def _text(values: Mapping[str, Any], name: str) -> str | None:
    if name not in values:
        return None
    return (
        f"{values[name] / 1e6:,.0f} MB"
        if name.endswith("_bytes") and is_number(values[name])
        else text_of(values[name])
    )


def _compared(sweep: Sweep, *others: str) -> list[str]:
    """Metrics by which trials are compared, and others, each once."""
    return list(dict.fromkeys((sweep.metric, *(bound.metric for bound in sweep.bounds), *others)))


def _reasons(sweep: Sweep) -> list[Part]:
    """Why trials did not train, most frequent reasons first."""
    rows = [
        (status, reason, len(trials), ", ".join(str(trial.number) for trial in trials))
        for status in ("failed", "infeasible")
        for reason, trials in reasons_of(sweep, status)
    ]
    head = ("status", "reason", "trials", "which")
    return [Table(head, rows, "What failed and why", id="reasons")] if rows else []


def _changes(sweep: Sweep) -> list[Part]:
    """Which trials of a population went on from which others."""
    rows = [
        (change.step, change.number, change.source, "; ".join(_differences(change))) for change in sweep.changes
    ]
    head = ("after step", "trial", "went on from trial", "its settings before and since")
    note = "Weights and optimizer state are those of the other trial's checkpoint."
    return [Table(head, rows, "Trials that went on from others", note, "changes")] if rows else []


def _differences(change: Change) -> list[str]:
    names = dict.fromkeys([*change.before, *change.values])
    return [
        f"{name} {_text(change.before, name) or '-'} → {_text(change.values, name) or '-'}"
        for name in names
        if change.before.get(name) != change.values.get(name)
    ]


def _trials(sweep: Sweep) -> Part:
    if not sweep.trials:
        return Missing("Trials", "The sweep has none yet.")
    metrics = _compared(sweep)
    head = (
        "trial",
        *metrics,
        "status",
        "steps",
        *sweep.settings,
        "FLOPs a token",
        "active parameters",
        "seconds",
        "attempts",
        "run",
    )
    rows = [_row(sweep, trial, metrics) for trial in sweep.ordered]
    outside = " Trials out of bounds come after those within." if sweep.bounds else ""
    note = f"The best first.{outside} A dash is a setting that the trial does not have, or what is not known."
    return Table(head, rows, "All trials", note, "trial-table")


def _row(sweep: Sweep, trial: Trial, metrics: Sequence[str]) -> list[Cell]:
    return [
        trial.number,
        *(short(trial.metrics.get(name, math.nan)) for name in metrics),
        trial.status,
        trial.steps,
        *(cell_of(trial.values.get(name)) for name in sweep.settings),
        trial.flops_per_token,
        trial.active_parameters,
        round(trial.seconds),
        trial.attempts,
        trial.run,
    ]
