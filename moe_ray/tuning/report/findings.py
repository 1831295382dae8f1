"""The first sentences of the page: what was best, by how much, what mattered, what it cost, and what failed."""

from moe_ray.analytics.report.parts import Finding
from moe_ray.telemetry.records import one_line
from moe_ray.tuning.report.cost import cost_text
from moe_ray.tuning.report.importance import importances
from moe_ray.tuning.report.sweep import Sweep, counted, cut, text_of
from moe_ray.tuning.report.trade import pareto_front, saved_text
from moe_ray.tuning.trials import Trial

_REASON = 200


def findings_of(sweep: Sweep) -> list[Finding]:
    """Sentences about a sweep."""
    found = []
    if sweep.best is not None:
        found.append(Finding(_best(sweep, sweep.best), "best"))
    found += _important(sweep)
    front = pareto_front(sweep)
    if len(front) > 1:
        numbers = ", ".join(str(trial.number) for trial in front)
        text = f"{sweep.metric} against FLOPs a token is a choice between trials {numbers}, the cheapest first."
        found.append(Finding(text, "pareto"))
    if any(trial.steps for trial in sweep.trials):
        found.append(Finding(cost_text(sweep), "sweep-cost"))
    if any(trial.status == "stopped" for trial in sweep.trials):
        found.append(Finding(saved_text(sweep), "learning"))
    return found + _trouble(sweep, "failed") + _trouble(sweep, "infeasible")


def reasons_of(sweep: Sweep, status: str) -> list[tuple[str, list[Trial]]]:
    """Reasons of trials of a status, the most frequent first, and their trials."""
    trials: dict[str, list[Trial]] = {}
    for trial in sweep.trials:
        if trial.status == status:
            trials.setdefault(trial.reason or "not known", []).append(trial)
    return sorted(trials.items(), key=lambda item: -len(item[1]))


def _best(sweep: Sweep, best: Trial) -> str:
    settings = ", ".join(f"{name} {text_of(value)}" for name, value in best.values.items())
    told = f"Trial {best.number} is the best: {sweep.metric} {text_of(sweep.objective(best))} with {settings}."
    base = sweep.as_configured
    if sweep.configured is None:
        return told
    if base is None:
        return f"{told} None ran as configured, to compare it with: sweep.first=[{{}}] of another sweep adds one."
    if base == best:
        return f"{told} It is the configuration as it stands."
    value, known = sweep.objective(base), sweep.objective(best)
    if base.status != "finished" or value is None or known is None:
        return f"{told} Trial {base.number}, as configured, cannot be compared with it: it is {base.status}."
    outside = "" if sweep.is_within(base) else ", which is out of bounds"
    difference = f"{abs(known - value):.2g} {'lower' if known < value else 'higher'} than"
    return (
        f"{told} That is {'no other than' if known == value else difference} {text_of(value)} of trial "
        f"{base.number}, as configured{outside}."
    )


def _important(sweep: Sweep) -> list[Finding]:
    important = importances(sweep)
    told = [f"{item.setting} ({item.share:.0%}, best: {item.best})" for item in important if item.is_told]
    if told:
        text = f"What mattered, by share of the variance of the trials' ranks: {', '.join(told)}."
        return [Finding(text, "importance")]
    return [Finding("No setting's effect is told from chance.", "importance")] if important else []


def _trouble(sweep: Sweep, status: str) -> list[Finding]:
    reasons = reasons_of(sweep, status)
    if not reasons:
        return []
    number = sum(len(trials) for _, trials in reasons)
    reason, trials = reasons[0]
    verb = "failed" if status == "failed" else "was infeasible" if number == 1 else "were infeasible"
    most = f", {len(trials)} of them" if len(reasons) > 1 else ""
    text = f"{number} of {counted(len(sweep.trials), 'trial')} {verb}{most}: {cut(one_line(reason), _REASON)}"
    return [Finding(text, "reasons")]
