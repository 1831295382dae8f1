"""A sweep as its page sees it, and how its trials look in all pictures."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_ray.analytics.report.spec import COLOURS, by_name
from moe_ray.tuning.trials import Trial

BEST, FINISHED, STOPPED, OTHER = "best", "finished", "stopped early", "failed or not done"
_STATES = (BEST, FINISHED, STOPPED, OTHER)
_LABEL = 24


@dataclass(frozen=True)
class Sweep:
    """Trials and what they were compared by.

    Attributes:
        name: of the sweep.
        trials: by number.
        metric: the objective.
        lowest: whether its lowest value is the best.
        steps: of a trial that is not stopped.
        best: the trial that won; None while there is none.
        hidden: settings that follow from others.
    """

    name: str
    trials: Sequence[Trial]
    metric: str
    lowest: bool
    steps: int
    best: Trial | None
    hidden: frozenset[str] = frozenset()

    @property
    def settings(self) -> list[str]:
        """What was searched, in the order of first use."""
        names = dict.fromkeys(name for trial in self.trials for name in trial.values)
        return [name for name in names if name not in self.hidden]

    @property
    def measured(self) -> list[Trial]:
        """Trials with an objective, the best first."""
        known = [trial for trial in self.trials if self.objective(trial) is not None]
        return sorted(known, key=self.loss)

    @property
    def step_range(self) -> tuple[int, int] | None:
        """First and last step of all evaluations."""
        steps = [step for trial in self.trials for step, _ in trial.history]
        return (min(0, *steps), max(1, *steps)) if steps else None

    def objective(self, trial: Trial) -> float | None:
        """The newest value, if it is a number."""
        value = trial.metrics.get(self.metric)
        return value if value is not None and math.isfinite(value) else None

    def loss(self, trial: Trial) -> float:
        """The objective with its sign turned where more is better; infinite where there is none."""
        value = self.objective(trial)
        return math.inf if value is None else value if self.lowest else -value

    def state(self, trial: Trial) -> str:
        """How it is drawn."""
        if self.best is not None and trial.number == self.best.number:
            return BEST
        return {"finished": FINISHED, "stopped": STOPPED}.get(trial.status, OTHER)


def state_encoding(sweep: Sweep) -> dict[str, Any]:
    """Colour and shape by state; the legend names the states that there are."""
    present = {sweep.state(trial) for trial in sweep.trials}
    names = [name for name in _STATES if name in present]
    looks = {
        "color": dict(zip(_STATES, (COLOURS[1], COLOURS[0], COLOURS[5], COLOURS[3]), strict=True)),
        "shape": dict(zip(_STATES, ("diamond", "circle", "cross", "triangle-down"), strict=True)),
    }
    return {
        channel: {
            "field": "state",
            "type": "nominal",
            "title": None,
            "scale": by_name(names, [look[name] for name in names]),
        }
        for channel, look in looks.items()
    }


def text_of(value: Any) -> str:
    """A value of a setting as people write it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def label_of(value: Any) -> str:
    """The same, short enough for an axis."""
    text = text_of(value)
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"


def is_number(value: Any) -> bool:
    """Whether it has a place on an axis of numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
