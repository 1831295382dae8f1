"""Alerts of a run, each from its first firing to its end, and collapse that no alert told of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_ray.analytics.report.events import step_at
from moe_ray.telemetry.history import History
from moe_ray.telemetry.records import time_of
from moe_ray.telemetry.rules import RULES

_COLLAPSE = next(rule for rule in RULES if rule.name == "ExpertCollapse")


@dataclass(frozen=True)
class RaisedAlert:
    """An alert of a rule for one set of labels.

    Attributes:
        summary: of its last firing, with the value.
        action: what helps; empty if it does not say.
        step: the last one logged before it first fired.
        resolved_step: the last one logged before it ended; None if it still fires.
        count: how often it fired.
    """

    name: str
    severity: str
    summary: str
    action: str
    step: int
    resolved_step: int | None = None
    count: int = 1

    @property
    def told(self) -> str:
        """In sentences."""
        times = "" if self.count == 1 else f", and {self.count} times in all"
        end = (
            "It has not resolved" if self.resolved_step is None else f"It resolved at step {self.resolved_step:,}"
        )
        what = f"{self.name} ({self.severity}) at step {self.step:,}{times}: {self.summary.rstrip('.')}. {end}."
        return f"{what} What helps: {self.action.rstrip('.')}." if self.action else what


def alerts_of(events: Sequence[Mapping[str, Any]], history: History) -> list[RaisedAlert]:
    """All that fired; those that still do come first."""
    raised: dict[tuple[str, str], RaisedAlert] = {}
    for event in events:
        key, step = (str(event.get("alert")), str(event.get("labels"))), step_at(history, time_of(event))
        before = raised.get(key)
        if event["event"] == "resolved" and before is not None:
            raised[key] = replace(before, resolved_step=step)
        elif event["event"] == "alert":
            severity, summary = str(event.get("severity", "alert")), str(event.get("summary", ""))
            alert = RaisedAlert(key[0], severity, summary, str(event.get("action", "")), step)
            raised[key] = replace(alert, step=before.step, count=before.count + 1) if before else alert
    return sorted(raised.values(), key=lambda alert: alert.resolved_step is not None)


def untold_collapse(alerts: Sequence[RaisedAlert], history: History, layers: Sequence[int]) -> str:
    """A sentence on experts that have collapsed at the last logged step without an alert; empty otherwise."""
    ratio_ML = history.by_layer.get("collapse")
    if ratio_ML is None or any(alert.name == _COLLAPSE.name for alert in alerts):
        return ""
    worst = int(np.argmax(np.nan_to_num(ratio_ML[-1])))
    if not ratio_ML[-1, worst] > _COLLAPSE.conditions[0].threshold:
        return ""
    step = int(history.column("step")[history.layers_M[-1]])
    return (
        f"The experts have collapsed: layer {layers[worst]} has {ratio_ML[-1, worst]:.2f} of the largest "
        f"imbalance that there can be at step {step:,}, and no alert told of it. What helps: {_COLLAPSE.action}"
    )
