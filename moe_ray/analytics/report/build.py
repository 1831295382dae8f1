"""The page of one run, and of several next to each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from moe_ray.analytics.analysis import Missing as Unanswered
from moe_ray.analytics.analysis import Question
from moe_ray.analytics.report.balance import balance_parts
from moe_ray.analytics.report.compare import comparison_parts, differing_settings
from moe_ray.analytics.report.cost import cost_parts
from moe_ray.analytics.report.curves import loss_parts
from moe_ray.analytics.report.findings import alerts_told, findings_of
from moe_ray.analytics.report.flow import flow_parts
from moe_ray.analytics.report.parts import Finding, Missing, Page, Part, Section, Table
from moe_ray.analytics.report.routers import router_parts
from moe_ray.analytics.report.run import Run
from moe_ray.analytics.report.specialisation import probe_parts, specialisation_parts
from moe_ray.analytics.report.speed import speed_parts
from moe_ray.analytics.report.timeline import event_parts, event_table

# Titles; the other questions ask for experts by a label.
_QUESTIONS: dict[Question, str] = {
    "top_tokens": "Top tokens of experts",
    "co_activation": "Experts chosen together",
    "flow": "Flow of tokens",
    "drift": "Drift between checkpoints",
    "probes": "Experts of patterns",
    "layers": "Routers by layer",
    "speed": "Predicted and measured speed",
}
# Sections of what could not be answered.
_HOMES: dict[Question, str] = {
    **dict.fromkeys(("domain", "token_class", "position", "top_tokens"), "specialisation"),
    **dict.fromkeys(("co_activation", "flow", "drift"), "together"),
    "layers": "held-out",
    "probes": "patterns",
    "speed": "costs",
}


def run_page(run: Run) -> Page:
    """The page of one run."""
    sections = [
        Section("curves", "Training curves", loss_parts(run)),
        Section("speed", "Speed", speed_parts(run)),
        Section("balance", "Load of the experts", balance_parts(run)),
        *_analysed(run),
        Section("samples", "Samples", _samples(run)),
        Section("events", "Events", event_parts(run)),
        Section("settings", "Settings", [_settings(run)]),
    ]
    lead = "One training run"
    if run.steps is not None:
        lead += f", up to step {run.steps[1]:,}" + (f" of {run.target:,}" if run.target else "")
    if run.analysis is not None:
        lead += f"; its checkpoints were analysed on {run.analysis.tokens:,} tokens of held-out text"
    return Page(run.name, f"{lead}.", findings_of(run), sections, run.steps)


def comparison_page(runs: Sequence[Run]) -> Page:
    """The page of several runs, with names that differ."""
    alerts = [
        Finding(f"{run.name}: {finding.text}", "compare" if finding.id == "load-cv" else f"events-{number}")
        for number, run in enumerate(runs, 1)
        for finding in alerts_told(run)
    ]
    findings = [
        Finding(
            f"{run.name}: {finding.text}", "compare-loss" if finding.id in ("loss", "perplexity") else "compare"
        )
        for run in runs
        for finding in findings_of(run)
        if finding.id in ("loss", "perplexity", "load", "time-shares")
    ]
    ranges = [run.steps for run in runs if run.steps is not None]
    steps = (min(first for first, _ in ranges), max(last for _, last in ranges)) if ranges else None
    sections = [
        Section("compare", "Side by side", comparison_parts(runs, steps)),
        *(
            Section(f"events-{number}", f"Events of {run.name}", _events(run, number))
            for number, run in enumerate(runs, 1)
        ),
        *(
            Section(f"samples-{number}", f"Samples of {run.name}", _samples(run))
            for number, run in enumerate(runs, 1)
        ),
        Section("settings", "Settings", [differing_settings([flat(run.settings) for run in runs], runs)]),
    ]
    names = ", ".join(run.name for run in runs)
    return Page(names, f"{len(runs)} training runs next to each other.", [*alerts, *findings], sections, steps)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings by dotted names, values as text."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = "null" if value is None else str(value)
    return found


def _analysed(run: Run) -> list[Section]:
    if run.analysis is None:
        reason = run.why_not or "The run has no checkpoint yet: checkpoint.every says at which steps it gets one."
        return [Section("specialisation", "Specialisation, flow and cost", [Missing("Analysis", reason)])]
    analysis = run.analysis
    sections = [
        Section("held-out", "Routing of held-out text", router_parts(analysis)),
        Section("specialisation", "Specialisation", specialisation_parts(analysis)),
        Section("together", "Experts together", flow_parts(analysis)),
        Section("patterns", "Patterns", probe_parts(analysis)),
        Section("costs", "Cost", cost_parts(analysis)),
    ]
    gone = [(_HOMES[missing.question], _missing(missing)) for missing in analysis.missing]
    whole = [
        Section(section.id, section.title, [*section.parts, *(part for home, part in gone if home == section.id)])
        for section in sections
    ]
    return [section for section in whole if section.parts]


def _missing(missing: Unanswered) -> Part:
    title = _QUESTIONS.get(missing.question, f"Experts by {missing.question.replace('_', ' ')}")
    return Missing(title, missing.reason)


def _events(run: Run, number: int) -> list[Part]:
    if not run.marks and not run.restarts:
        return [Missing("Events", "None: there is no events.jsonl, and the steps show no restart.")]
    return [event_table(run, f"event-table-{number}")]


def _samples(run: Run) -> Sequence[Part]:
    return run.samples or [Missing("Samples", run.why_not or "The run has no checkpoint that could write yet.")]


def _settings(run: Run) -> Part:
    if not run.settings:
        return Missing("Settings", "The run's config.yaml is missing or damaged.")
    note = (
        "" if run.config is not None else "This version does not understand these settings; layers count from 0."
    )
    return Table(("setting", "value"), list(flat(run.settings).items()), "config.yaml", note)
