"""A sweep as its page sees it, and how its trials look in all pictures."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_ray.analytics.report.parts import Cell
from moe_ray.analytics.report.spec import COLOURS, by_name
from moe_ray.sweep_config import Constraint
from moe_ray.tuning.changes import Change
from moe_ray.tuning.objective import violation
from moe_ray.tuning.trials import Trial

BEST, FINISHED, STOPPED, OTHER = "best", "finished", "stopped early", "failed or not done"
# Positive numbers that span such a factor are drawn on a logarithmic axis.
LOG_SPAN = 8
_STATES = (BEST, FINISHED, STOPPED, OTHER)
_IN_NATS = ("loss", "val_loss")


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
        configured: values of a trial that leaves the configuration as it stands; None where nothing is compared
            with it.
        bounds: on metrics; trials within them are better than any that is not.
        most: trials that it may have.
        held_out_tokens: of an evaluation, at most; 0: not known, or not the same for all.
        changes: which trials went on from which others.
    """

    name: str
    trials: Sequence[Trial]
    metric: str
    lowest: bool
    steps: int
    best: Trial | None
    hidden: frozenset[str] = frozenset()
    configured: Mapping[str, Any] | None = None
    bounds: tuple[Constraint, ...] = ()
    most: int = 0
    held_out_tokens: int = 0
    changes: tuple[Change, ...] = ()

    @property
    def settings(self) -> list[str]:
        """What was searched, in the order of first use."""
        names = dict.fromkeys(name for trial in self.trials for name in trial.values)
        return [name for name in names if name not in self.hidden]

    @property
    def measured(self) -> list[Trial]:
        """Trials with an objective, the best first."""
        return [trial for trial in self.ordered if self.objective(trial) is not None]

    @property
    def ordered(self) -> list[Trial]:
        """All trials, the best first, those out of bounds after those within."""
        return sorted(self.trials, key=lambda trial: (not self.is_within(trial), self.loss(trial), trial.number))

    @property
    def as_configured(self) -> Trial | None:
        """The trial that ran with the configuration as it stands."""
        return next((trial for trial in self.trials if trial.values == self.configured), None)

    @property
    def axis_title(self) -> str:
        """The objective, its unit if it is known, and which end of the axis is the better one."""
        unit = " (nats)" if self.metric in _IN_NATS else ""
        return f"{self.metric}{unit}, {'lower' if self.lowest else 'higher'} is better"

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

    def is_within(self, trial: Trial) -> bool:
        """Whether its metrics keep to the bounds."""
        return violation(self.bounds, trial.metrics) is None

    def state(self, trial: Trial) -> str:
        """How it is drawn."""
        if self.best is not None and trial.number == self.best.number:
            return BEST
        return {"finished": FINISHED, "stopped": STOPPED}.get(trial.status, OTHER)


def state_encoding(sweep: Sweep, trials: Iterable[Trial]) -> dict[str, Any]:
    """Colour and shape by state; the legend names the states of these trials."""
    present = {sweep.state(trial) for trial in trials}
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


def count_axis(field: str, title: str, *, log: bool) -> dict[str, Any]:
    """A horizontal axis of large numbers, such as FLOPs."""
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": {"nice": False, "padding": 12, **({"type": "log"} if log else {"zero": False})},
        "axis": {"format": ".3~s", "tickCount": 6, "labelBound": True},
    }


def text_of(value: Any) -> str:
    """A value of a setting as people write it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def cell_of(value: Any) -> Cell:
    """The same in a table; None where there is no value."""
    return value if value is None or is_number(value) else text_of(value)


def cut(text: str, most: int) -> str:
    """At most so many characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def counted(number: int, what: str) -> str:
    """So many of them: 1 trial, 2 trials."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def is_number(value: Any) -> bool:
    """Whether it has a place on an axis of numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
