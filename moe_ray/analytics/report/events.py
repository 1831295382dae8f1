"""What happened to a run, on its axis of steps: events that were noted, and restarts that logged steps show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from moe_ray.telemetry.history import History
from moe_ray.telemetry.records import time_of

# Kinds of events.jsonl, with the letter that stands above a chart.
_LETTERS = {
    "start": "S",
    "restart": "R",
    "resize": "Z",
    "drain": "D",
    "failure": "F",
    "waiting": "W",
    "stop": "E",
    "alert": "A",
    "resolved": "a",
}
_MOST_ON_AXES = 40


@dataclass(frozen=True)
class Mark:
    """An event at a step: the last one that was logged, and kept, before it."""

    step: int
    letter: str
    kind: str
    text: str
    time: float | None

    @property
    def when(self) -> str:
        """UTC, to the second."""
        if self.time is None:
            return ""
        return f"{datetime.fromtimestamp(self.time, UTC):%Y-%m-%d %H:%M:%S}"


@dataclass(frozen=True)
class Restart:
    """A start of the workers that went on from a checkpoint.

    Attributes:
        step: of the checkpoint.
        redone: steps that were done again.
        restore_seconds: what loading took.
        reason: of the failure before it, where one was noted.
    """

    step: int
    redone: int
    restore_seconds: float
    reason: str


def marks_of(events: Sequence[Mapping[str, Any]], history: History) -> list[Mark]:
    """All events, oldest first."""
    times, steps = history.column("time"), history.column("step")
    marks = []
    for event in events:
        kind, time = str(event["event"]), time_of(event) or None
        index = int(np.searchsorted(times, time or 0.0, side="right"))
        step = int(steps[index - 1]) if index else 0
        letter = _LETTERS.get(kind, kind[:1].upper() or "?")
        marks.append(Mark(step, letter, kind, _describe(event), time))
    return marks


def on_axes(marks: Sequence[Mark]) -> list[Mark]:
    """Those drawn over charts: one for each step, with the letters of all, but not of what only waits."""
    steps: dict[int, list[Mark]] = {}
    for mark in marks:
        if mark.kind != "waiting":
            steps.setdefault(mark.step, []).append(mark)
    merged = [
        Mark(
            step,
            "".join(dict.fromkeys(mark.letter for mark in of_step)),
            "",
            "; ".join(dict.fromkeys(mark.text for mark in of_step)),
            None,
        )
        for step, of_step in steps.items()
    ]
    return merged[:_MOST_ON_AXES]


def restarts_of(history: History, marks: Sequence[Mark]) -> list[Restart]:
    """Starts after the first, as the logged steps tell them; a run in a single process has no events."""
    resumed, redone = history.column("resumed_step"), history.column("redone_steps")
    seconds, times = history.column("restore_seconds"), history.column("time")
    keys = np.stack([resumed, redone, seconds], axis=1)
    restarts = []
    for index in range(1, len(history)):
        if np.isfinite(resumed[index]) and not np.array_equal(keys[index], keys[index - 1], equal_nan=True):
            reason = _last_failure(marks, times[index - 1], times[index])
            restarts.append(
                Restart(int(resumed[index]), int(np.nan_to_num(redone[index])), float(seconds[index]), reason)
            )
    return restarts


def _last_failure(marks: Sequence[Mark], after: float, before: float) -> str:
    causes = [mark for mark in marks if mark.time is not None and after <= mark.time <= before]
    texts = [mark.text for mark in causes if mark.kind in ("failure", "drain", "resize", "stop")]
    return texts[0] if texts else ""


def _describe(event: Mapping[str, Any]) -> str:
    """In words; whatever else an event says follows by name."""
    rest = {name: value for name, value in event.items() if name not in ("event", "time")}
    kind = str(event["event"])
    if kind == "start" and "workers" in rest:
        text = f"{rest.pop('workers')} workers start"
    elif kind == "resize" and "workers" in rest:
        text = f"a change to {rest.pop('workers')} workers"
    elif kind == "failure" and "reason" in rest:
        ranks = rest.pop("ranks", None) or ["unknown"]
        ranks = ", ".join(map(str, ranks if isinstance(ranks, list) else [ranks]))
        text = f"a failure of rank {ranks}: {rest.pop('reason')}"
        text += "" if rest.pop("retry", True) else ", after which the run gave up"
        rest.pop("saved_step", None)
    elif kind == "alert" and "summary" in rest:
        action = f" {rest['action']}" if "action" in rest else ""
        return f"{rest.get('alert', '')} {rest.get('severity', 'alert')}: {rest['summary']}{action}"
    elif kind == "resolved" and "summary" in rest:
        return str(rest["summary"])
    elif kind == "drain":
        text = f"notice that {rest.pop('nodes', 'some')} nodes leave"
    else:
        text = kind
    return "; ".join([text, *(f"{name.replace('_', ' ')} {value}" for name, value in rest.items())])
