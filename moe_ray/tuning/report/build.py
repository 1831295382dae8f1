"""`sweep.html`: one page on a sweep, which loads nothing from anywhere."""

from collections.abc import Sequence

from moe_ray.analytics.report.page import render
from moe_ray.analytics.report.parts import Cell, Finding, Missing, Page, Part, Section, Table
from moe_ray.analytics.report.spec import short
from moe_ray.storage import Storage
from moe_ray.tuning.report.importance import importance_parts, importances
from moe_ray.tuning.report.parallel import parallel_parts
from moe_ray.tuning.report.sweep import Sweep, text_of
from moe_ray.tuning.report.trade import curve_parts, pareto_front, pareto_parts, saved_text
from moe_ray.tuning.trials import Trial

SWEEP_PAGE = "sweep.html"


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
    parts = [
        *(sections or [Section("best", "Best trial", [_best(sweep)])]),
        Section("settings", "Settings", [*parallel_parts(sweep), *importance_parts(sweep)]),
        Section("cost", "Loss and cost", pareto_parts(sweep)),
        Section("learning", "Learning curves", curve_parts(sweep)),
        Section("trials", "Trials", [_trials(sweep)]),
    ]
    which = "lowest" if sweep.lowest else "highest"
    searched = ", ".join(sweep.settings) or "no setting"
    lead = f"A sweep of {len(sweep.trials):,} trials for the {which} {sweep.metric} over {searched}."
    return Page(sweep.name, lead, [*findings, *_findings(sweep)], parts, sweep.step_range)


def _findings(sweep: Sweep) -> list[Finding]:
    found = []
    if sweep.best is not None:
        value = sweep.objective(sweep.best)
        settings = ", ".join(f"{name}={text_of(value)}" for name, value in sweep.best.values.items())
        found.append(
            Finding(
                f"Trial {sweep.best.number} is the best: {sweep.metric} {text_of(value)} with {settings}.", "best"
            )
        )
    important = importances(sweep)
    told = [f"{item.setting} ({item.share:.0%})" for item in important if item.is_told]
    if told:
        found.append(
            Finding(f"What decided, in this order: {', '.join(told)} of the variance of ranks.", "importance")
        )
    elif important:
        found.append(Finding("No setting's effect is told from chance.", "importance"))
    front = pareto_front(sweep)
    if len(front) > 1:
        numbers = ", ".join(str(trial.number) for trial in front)
        found.append(
            Finding(
                f"Loss against FLOPs a token is a choice between trials {numbers}, the cheapest first.", "pareto"
            )
        )
    if any(trial.status == "stopped" for trial in sweep.trials):
        found.append(Finding(saved_text(sweep), "curves"))
    for status, what in (("failed", "failed"), ("infeasible", "were impossible")):
        numbers = [str(trial.number) for trial in sweep.trials if trial.status == status]
        if numbers:
            found.append(
                Finding(
                    f"{len(numbers)} of {len(sweep.trials)} trials {what}: {', '.join(numbers[:20])}.", "trials"
                )
            )
    return found


def _best(sweep: Sweep) -> Part:
    if sweep.best is None:
        return Missing("Best trial", "No trial has finished within the constraints yet.")
    rows = [(name, text_of(value)) for name, value in sweep.best.values.items()]
    rows += [(name, text_of(value)) for name, value in sorted(sweep.best.metrics.items())]
    run = f"Run {sweep.best.run}, {sweep.best.steps:,} steps, seed {sweep.best.seed}"
    note = f"{run}. best.yaml has all of its settings."
    return Table(("setting or metric", "value"), rows, f"Trial {sweep.best.number}", note)


def _trials(sweep: Sweep) -> Part:
    if not sweep.trials:
        return Missing("Trials", "The sweep has none yet.")
    head = (
        "trial",
        sweep.metric,
        "status",
        "steps",
        *sweep.settings,
        "FLOPs a token",
        "active parameters",
        "seconds",
        "attempts",
        "run",
        "reason",
    )
    ordered = sorted(sweep.trials, key=lambda trial: (sweep.loss(trial), trial.number))
    note = "The best first. A dash is a setting that the trial does not have, or what is not known."
    return Table(head, [_row(sweep, trial) for trial in ordered], "All trials", note, "trial-table")


def _row(sweep: Sweep, trial: Trial) -> list[Cell]:
    value = sweep.objective(trial)
    settings = [trial.values.get(name) for name in sweep.settings]
    return [
        trial.number,
        None if value is None else short(value),
        trial.status,
        trial.steps,
        *(None if setting is None else text_of(setting) for setting in settings),
        trial.flops_per_token,
        trial.active_parameters,
        round(trial.seconds),
        trial.attempts,
        trial.run,
        trial.reason,
    ]
