"""What happened to a run, on its axis of steps: events that were noted, and the restarts that they tell of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from moe_ray.telemetry.history import History
from moe_ray.telemetry.records import time_of

# Kinds of events.jsonl, with the letter that stands above a chart.
_LETTERS = {
    "job": "J",
    "start": "S",
    "restart": "R",
    "resize": "Z",
    "drain": "D",
    "failure": "F",
    "waiting": "W",
    "yield": "Y",
    "stop": "E",
    "alert": "A",
    "resolved": "a",
}
# Kinds that change nothing by themselves: charts leave them out.
QUIET = frozenset({"job", "waiting"})
_MOST_ON_AXES = 40
# Kinds after which workers start anew.
_CAUSES = ("failure", "drain", "resize", "stop")


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
        return utc(self.time)


@dataclass(frozen=True)
class Restart:
    """A start of the workers after their first one.

    Attributes:
        time: Unix time; NaN if it was not noted.
        step: of the checkpoint that it went on from; None if it is not known.
        redone: logged steps that were done again; None if the start logged none itself.
        restore_seconds: what loading took; NaN if the start logged no step.
        reason: of the failure before it, where one was noted.
    """

    time: float
    step: int | None
    redone: int | None
    restore_seconds: float
    reason: str

    def told(self, log_every: int | None) -> str:
        """What it cost, in words; steps that were done but not logged before are not known to the run.

        Args:
            log_every: steps from one logged step to the next, at most; None if not known.
        """
        if self.redone is None:
            return "it logged no step"
        if log_every is None:
            return (
                f"{_steps(self.redone)} of those logged done again" if self.redone else "no logged step done again"
            )
        most = self.redone + log_every - 1
        if self.redone == most:
            return f"{_steps(most)} done again" if most else "no step done again"
        return f"{self.redone} to {_steps(most)} done again" if self.redone else f"up to {_steps(most)} done again"


def utc(time: float | None) -> str:
    """To the second; empty where there is none."""
    known = time is not None and math.isfinite(time)
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M:%S}" if known else ""


def marks_of(events: Sequence[Mapping[str, Any]], history: History) -> list[Mark]:
    """All events, oldest first."""
    marks = []
    for event in events:
        kind, time = str(event["event"]), time_of(event) or None
        letter = _LETTERS.get(kind, kind[:1].upper() or "?")
        marks.append(Mark(step_at(history, time), letter, kind, _describe(event), time))
    return marks


def step_at(history: History, time: float | None) -> int:
    """The last step that was logged, and kept, before a time; 0 without one."""
    index = int(np.searchsorted(history.column("time"), time or 0.0, side="right"))
    return int(history.column("step")[index - 1]) if index else 0


def on_axes(marks: Sequence[Mark]) -> list[Mark]:
    """Those drawn over charts: one for each step, with the letters of all but the quiet ones."""
    steps: dict[int, list[Mark]] = {}
    for mark in marks:
        if mark.kind not in QUIET:
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


def restarts_of(events: Sequence[Mapping[str, Any]], history: History) -> list[Restart]:
    """Starts after the first: as the events tell them, or the logged steps of a run that noted none."""
    starts = [time for event in events if event["event"] == "start" and (time := time_of(event)) is not None]
    logged = _logged_starts(history)
    if len(logged) > len(starts):
        starts = logged
    spans = zip(starts, starts[1:], [*starts[2:], math.inf], strict=False)
    return [_restart(events, history, *span) for span in spans]


def _logged_starts(history: History) -> list[float]:
    """When each start that left a step in the log had logged its first one."""
    names = ("resumed_step", "redone_steps", "restore_seconds")
    keys = np.stack([history.column(name) for name in names], axis=1)
    times = history.column("time")
    return [
        float(times[row])
        for row in range(len(history))
        if row == 0 or (np.isfinite(keys[row, 0]) and not np.array_equal(keys[row], keys[row - 1], equal_nan=True))
    ]


def _restart(
    events: Sequence[Mapping[str, Any]], history: History, before: float, start: float, end: float
) -> Restart:
    """The start that lies between two others."""
    causes = [
        event for event in events if event["event"] in _CAUSES and before <= (time_of(event) or 0.0) <= start
    ]
    reason = _describe(causes[-1]) if causes else ""
    times = history.column("time")
    rows = np.flatnonzero((start <= times) & (times < end) & np.isfinite(history.column("resumed_step")))
    if not len(rows):
        saved = causes[-1].get("saved_step") if causes else None
        return Restart(start, saved if isinstance(saved, int) else None, None, math.nan, reason)
    resumed, redone, seconds = (
        history.column(name)[rows[0]] for name in ("resumed_step", "redone_steps", "restore_seconds")
    )
    return Restart(start, int(resumed), int(np.nan_to_num(redone)), float(seconds), reason)


def _steps(count: int) -> str:
    return f"{count} step" if count == 1 else f"{count} steps"


def _describe(event: Mapping[str, Any]) -> str:
    """In words; whatever else an event says follows by name."""
    rest = {name: value for name, value in event.items() if name not in ("event", "time")}
    kind = str(event["event"])
    if kind == "job" and "submission" in rest:
        text = f"job {rest.pop('submission')} trains"
        metadata = rest.pop("metadata", None)
        rest |= metadata if isinstance(metadata, dict) else {}
    elif kind == "start" and "workers" in rest:
        count = rest.pop("workers")
        text = "1 worker starts" if count == 1 else f"{count} workers start"
    elif kind == "resize" and "workers" in rest:
        count = rest.pop("workers")
        text = f"a change to {count} worker{'' if count == 1 else 's'}"
    elif kind == "failure" and "reason" in rest:
        ranks = rest.pop("ranks", None) or ["unknown"]
        ranks = ", ".join(map(str, ranks if isinstance(ranks, list) else [ranks]))
        text = f"a failure of rank {ranks}: {str(rest.pop('reason')).rstrip('.')}"
        text += "" if rest.pop("retry", True) else ", after which the run gave up"
        rest.pop("saved_step", None)
    elif kind == "alert" and "summary" in rest:
        action = f" What helps: {rest['action']}" if "action" in rest else ""
        severity = rest.get("severity", "alert")
        return f"{rest.get('alert', '')} {severity}: {str(rest['summary']).rstrip('.')}.{action}"
    elif kind == "resolved" and "summary" in rest:
        return str(rest["summary"])
    elif kind == "drain":
        count = rest.pop("nodes", "some")
        text = f"notice that {count} node{' leaves' if count == 1 else 's leave'}"
    elif kind == "yield":
        count = rest.pop("replicas", "some")
        text = f"{count} replica{' waits' if count == 1 else 's wait'} for room of this run"
    else:
        text = kind
    return "; ".join([text, *(f"{name.replace('_', ' ')} {value}" for name, value in rest.items())])
