"""Conditions on metrics: one description that is written as PromQL and evaluated in process, to the same numbers.

A condition holds of a series if `transform(metric{where})`, aggregated over all labels but `by`, and divided by
another such number where `over` is given, compares to the threshold.
"""

from dataclasses import dataclass
from typing import Literal

from moe_ray.telemetry.catalogue import CATALOGUE

Transform = Literal["value", "age", "increase", "rise", "gone"]
Aggregate = Literal["sum", "max", "min", "count"]


@dataclass(frozen=True)
class Term:
    """A number for each set of labels.

    Attributes:
        metric: a name of the catalogue.
        transform: `value`: the newest; `age`: seconds since the moment that is its value; `increase`: of a counter
            in the window, as Prometheus' `increase`; `rise`: of a gauge over its lowest in the window; `gone`: the
            highest in the window of a series that has no value now.
        window: seconds.
        where: label and regular expression that its whole value matches.
        aggregate: over the series that have the same labels `by`.
    """

    metric: str
    transform: Transform = "value"
    window: int = 0
    where: tuple[tuple[str, str], ...] = ()
    aggregate: Aggregate = "max"

    def __post_init__(self) -> None:
        assert self.metric in CATALOGUE, self.metric
        assert (self.window > 0) == (self.transform in ("increase", "rise", "gone")), self

    def promql(self, by: tuple[str, ...]) -> str:
        """The expression for Prometheus."""
        matchers = ",".join(f'{label}=~"{pattern}"' for label, pattern in self.where)
        series = CATALOGUE[self.metric].exposed_name + (f"{{{matchers}}}" if matchers else "")
        window = f"{series}[{self.window}s]"
        inner = {
            "value": series,
            "age": f"time() - {series}",
            "increase": f"increase({window})",
            "rise": f"{series} - min_over_time({window})",
            "gone": f"max_over_time({window}) unless {series}",
        }[self.transform]
        return f"{self.aggregate} by ({', '.join(by)}) ({inner})"


@dataclass(frozen=True)
class Condition:
    """A comparison.

    Attributes:
        by: labels that its series keep.
    """

    term: Term
    compare: Literal[">", "<"]
    threshold: float
    by: tuple[str, ...] = ()
    over: Term | None = None

    @property
    def number(self) -> str:
        """PromQL of what is compared."""
        left = self.term.promql(self.by)
        return left if self.over is None else f"{left} / {self.over.promql(self.by)}"

    @property
    def promql(self) -> str:
        """PromQL of the series for which it holds."""
        return f"{self.number} {self.compare} {self.threshold:g}"
