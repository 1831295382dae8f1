"""Alerts of rules: pending while their conditions hold too briefly, then firing, then resolved."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from moe_ray.telemetry.evaluate import holds
from moe_ray.telemetry.rules import Rule
from moe_ray.telemetry.sample_store import Labels, SampleStore
from moe_ray.telemetry.samples import Sample


class State(StrEnum):
    """Of an alert that is not inactive."""

    PENDING = "pending"
    FIRING = "firing"
    RESOLVED = "resolved"


@dataclass(frozen=True)
class Alert:
    """One rule for one set of labels.

    Attributes:
        since: when the conditions began to hold, in Unix seconds.
        value: the newest.
    """

    rule: Rule
    labels: Labels
    state: State
    since: float
    value: float

    @property
    def summary(self) -> str:
        """One line with the value; of one that has resolved only whose it was, as the rest no longer holds."""
        if self.state is State.RESOLVED:
            labels = ", ".join(f"{name}={value}" for name, value in self.labels)
            return f"resolved {self.rule.name}" + (f" ({labels})" if labels else "")
        # Over nothing, such as requests that wait where none runs; as Prometheus writes it.
        value = "+Inf" if self.value == math.inf else f"{self.value:.{self.rule.digits}f}"
        return self.rule.summary.format(value=value, **dict(self.labels))

    def record(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        return {
            "alert": self.rule.name,
            "state": str(self.state),
            "severity": self.rule.severity,
            "component": self.rule.component,
            "labels": dict(self.labels),
            "value": self.value if math.isfinite(self.value) else None,
            "since": self.since,
            "summary": self.summary,
            "action": self.rule.action,
            "runbook": self.rule.runbook,
        }


_Key = tuple[str, Labels]


class Alerts:
    """The state of all alerts of some rules.

    An alert is told when it begins to fire, and when it resolves if its firing was told. One that fires again
    within its rule's cooldown is not told, unless it still fires when the cooldown is over.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._active: dict[_Key, Alert] = {}
        self._told_at: dict[_Key, float] = {}
        self._open: set[_Key] = set()

    def update(self, store: SampleStore, now: float) -> list[Alert]:
        """Evaluate the rules; returns what is to be told: alerts that fire or have resolved."""
        found = {
            (rule.name, labels): (rule, value)
            for rule in self._rules
            for labels, value in holds(rule, store, now).items()
        }
        news = [self._resolve(key, now) for key in list(self._active) if key not in found]
        for key, (rule, value) in found.items():
            news.append(self._hold(key, rule, value, now))
        return [alert for alert in news if alert is not None]

    def active(self, state: State = State.FIRING) -> list[Alert]:
        """Those that fire now, or are pending."""
        return [alert for alert in self._active.values() if alert.state is state]

    def samples(self) -> Iterable[Sample]:
        """For each rule whether any of its alerts fires."""
        firing = {alert.rule.name for alert in self.active()}
        for rule in self._rules:
            labels = {"alert": rule.name, "severity": rule.severity}
            yield Sample("moe_alert_firing", labels, float(rule.name in firing))

    def _hold(self, key: _Key, rule: Rule, value: float, now: float) -> Alert | None:
        before = self._active.get(key)
        since = min(before.since, now) if before else now
        state = State.FIRING if now - since >= rule.for_seconds else State.PENDING
        alert = self._active[key] = Alert(rule, key[1], state, since, value)
        # A time ahead is of a clock since set back.
        is_told = key in self._open or 0 <= now - self._told_at.get(key, -math.inf) < rule.cooldown_seconds
        if state is State.PENDING or is_told:
            return None
        self._told_at[key] = now
        self._open.add(key)
        return alert

    def _resolve(self, key: _Key, now: float) -> Alert | None:
        ended = self._active.pop(key)
        if key not in self._open:
            return None
        self._open.discard(key)
        return Alert(ended.rule, ended.labels, State.RESOLVED, ended.since, ended.value)
