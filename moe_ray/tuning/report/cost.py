"""What a sweep cost, and for trials that became what."""

import math
from collections.abc import Sequence
from datetime import timedelta

from moe_ray.analytics.report.parts import Cell, Missing, Part, Table
from moe_ray.tuning.report.sweep import Sweep, counted
from moe_ray.tuning.trials import Trial

_TITLE = "What the trials cost"


def cost_parts(sweep: Sweep) -> list[Part]:
    """The table, or why there is none."""
    if not any(trial.steps for trial in sweep.trials):
        return [Missing(_TITLE, "No trial has trained yet.")]
    statuses = dict.fromkeys(trial.status for trial in sweep.trials)
    groups = {status: [trial for trial in sweep.trials if trial.status == status] for status in statuses}
    rows = [_row(status, trials) for status, trials in {**groups, "all": sweep.trials}.items()]
    head = ("status", "trials", "time (h:min:s)", "FLOPs", "steps", "tokens")
    note = "Of training, forward and backward, without steps that were done again. Times of trials are added up."
    return [Table(head, rows, _TITLE, note, "sweep-cost")]


def cost_text(sweep: Sweep) -> str:
    """The same in a sentence."""
    failed = [trial for trial in sweep.trials if trial.status == "failed"]
    flops, lost = _flops(sweep.trials), _flops(failed)
    steps = counted(sum(trial.steps for trial in sweep.trials), "step")
    told = f" and {flops:.3g} FLOPs" if flops else ""
    share = f", {lost / flops:.0%} of them for trials that failed" if lost else ""
    return f"All trials together took {_time(sweep.trials)} (h:min:s), {steps}{told}{share}."


def _row(status: str, trials: Sequence[Trial]) -> list[Cell]:
    steps, flops = sum(trial.steps for trial in trials), _flops(trials)
    tokens = sum(map(_tokens, trials))
    whole = round(tokens) if math.isfinite(tokens) else None
    return [status, len(trials), _time(trials), f"{flops:.3g}" if flops else None, steps, whole or None]


def _flops(trials: Sequence[Trial]) -> float:
    return sum((trial.flops_per_token or 0) * _tokens(trial) for trial in trials)


def _tokens(trial: Trial) -> float:
    tokens = trial.metrics.get("tokens", 0)
    return tokens if math.isfinite(tokens) else 0


def _time(trials: Sequence[Trial]) -> str:
    return str(timedelta(seconds=round(sum(trial.seconds for trial in trials))))
