"""The summary: what the pictures say, in sentences that link to them."""

import math

import numpy as np

from moe_ray.analytics.report.alerts import untold_collapse
from moe_ray.analytics.report.parts import Finding
from moe_ray.analytics.report.run import Run
from moe_ray.analytics.report.speed import phase_shares

_MOST_PREFERENCES = 3
_MOST_RESTARTS = 4
_MOST_ALERTS = 5


def findings_of(run: Run) -> list[Finding]:
    """Sentences about one run."""
    return [
        *alerts_told(run),
        *_progress(run),
        *_loss(run),
        *_balance(run),
        *_preferences(run),
        *_time(run),
        *_restarts(run),
        *_trouble(run),
    ]


def alerts_told(run: Run) -> list[Finding]:
    """Sentences about what went wrong, which come before all others."""
    place = "timeline" if run.steps is not None else "event-table"
    findings = [Finding(alert.told, place) for alert in run.alerts[:_MOST_ALERTS]]
    if len(run.alerts) > _MOST_ALERTS:
        findings.append(Finding(f"{len(run.alerts) - _MOST_ALERTS} more alerts are listed.", place))
    collapse = untold_collapse(run.alerts, run.history, run.layers)
    return [Finding(collapse, "load-cv"), *findings] if collapse else findings


def _progress(run: Run) -> list[Finding]:
    if run.steps is None or run.target is None:
        return []
    last = run.steps[1]
    if last >= run.target:
        return [Finding(f"The run has all of its {run.target:,} steps.", "loss")]
    text = f"The run has {last:,} of its {run.target:,} steps: it still trains, or was ended."
    return [Finding(text, "loss")]


def _loss(run: Run) -> list[Finding]:
    loss = run.history.column("loss")
    known = loss[np.isfinite(loss)]
    if not len(known):
        return []
    text = f"The training loss went from {known[0]:.2f} to {known[-1]:.2f}"
    perplexity = run.history.last("val_perplexity")
    if perplexity is None:
        return [Finding(f"{text}; held-out text was not measured.", "loss")]
    steps = run.history.column("step")[np.isfinite(run.history.column("val_perplexity"))]
    return [Finding(f"{text}; held-out perplexity is {perplexity:.1f} at step {int(steps[-1])}.", "perplexity")]


def _balance(run: Run) -> list[Finding]:
    load_MLE, cv_ML = run.history.load_MLE, run.history.by_layer.get("load_cv")
    if load_MLE is None or cv_ML is None:
        return []
    cv_L = cv_ML[-1]
    worst = int(np.argmax(cv_L))
    load_E = load_MLE[-1, worst] * load_MLE.shape[2]
    least = f"only {load_E.min():.1f} times" if load_E.min() >= 0.05 else "next to nothing"
    text = (
        f"Layer {run.layers[worst]} has the least balanced experts: load CV {cv_L[worst]:.2f} at the last logged "
        f"step, where the best layer has {cv_L.min():.2f}. Its expert {int(load_E.argmax())} gets "
        f"{load_E.max():.1f} times its fair share, expert {int(load_E.argmin())} {least}."
    )
    return [Finding(text, "load")]


def _preferences(run: Run) -> list[Finding]:
    found = run.analysis.specialisations if run.analysis is not None else ()
    domain = next((each for each in found if each.kind == "domain"), None)
    if domain is None:
        return []
    experts = [(layer.layer, expert) for layer in domain.layers for expert in layer.experts if expert.label]
    clear = sorted((item for item in experts if item[1].is_significant), key=lambda item: -item[1].lift)
    if not clear:
        text = f"None of the {len(experts)} experts prefers a domain more than chance would make one do."
        return [Finding(text, "preferences-domain")]
    clearest = {expert.label: (layer, expert) for layer, expert in reversed(clear)}
    shares = dict(zip(domain.labels, domain.label_shares, strict=True))
    sentences = [
        f"expert {expert.expert} of layer {layer} prefers {label} ({expert.share:.0%} of its routing weight, "
        f"{shares[label]:.0%} over all experts; p = {expert.p_value:.2g})"
        for label, (layer, expert) in sorted(clearest.items(), key=lambda item: -item[1][1].lift)
        if label is not None
    ]
    chosen = "; ".join(sentences[:_MOST_PREFERENCES])
    text = f"{len(clear)} of {len(experts)} experts prefer a domain significantly: {chosen}."
    return [Finding(text, "by-domain")]


def _time(run: Run) -> list[Finding]:
    shares = list(phase_shares(run).items())
    speed = run.history.column("tokens_per_second")
    if not shares:
        return []
    largest = ", ".join(f"{name} {share:.0%}" for name, share in shares[:3])
    text = f"Most of a step's time goes to {largest}; the median speed is {np.nanmedian(speed):,.0f} tokens/s."
    return [Finding(text, "time-shares")]


def _restarts(run: Run) -> list[Finding]:
    if run.steps is None and not run.restarts:
        return []
    if not run.restarts:
        return [Finding("It never restarted from a checkpoint.", "timeline")]
    each = [
        ("" if restart.step is None else f"from step {restart.step} ")
        + f"({restart.told(run.log_every)})"
        + (f" after {restart.reason}" if restart.reason else "")
        for restart in run.restarts[:_MOST_RESTARTS]
    ]
    count = len(run.restarts)
    rest = f"; {count - len(each)} more are listed" if count > len(each) else ""
    text = f"It restarted {'once' if count == 1 else f'{count} times'}: {'; '.join(each)}{rest}."
    return [Finding(text, "timeline" if run.steps is not None else "event-table")]


def _trouble(run: Run) -> list[Finding]:
    findings = []
    skipped = float(np.nansum(run.history.column("skipped_steps")))
    if skipped:
        findings.append(
            Finding(f"{_were(skipped, 'step')} skipped because of values that were not finite.", "gradient-norm")
        )
    dead = run.history.last("dead_experts") or 0.0
    if dead and math.isfinite(dead):
        text = f"{dead:.0f} expert{'' if dead == 1 else 's'} had no token at the last logged step."
        findings.append(Finding(text, "dead-experts-by-layer"))
    if run.history.damaged:
        text = f"{_were(run.history.damaged, 'line')} left out of metrics.jsonl: unfinished or damaged."
        findings.append(Finding(text, "settings"))
    return findings


def _were(count: float, what: str) -> str:
    return f"1 {what} was" if count == 1 else f"{count:,.0f} {what}s were"
