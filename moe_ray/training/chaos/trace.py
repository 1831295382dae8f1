"""What the logs of a run say about one fault: when it was noticed, when training went on, what it cost."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_ray.training.chaos.schedule import OUTAGES, Fault

_NOTICED = frozenset({"failure", "drain", "resize", "restart"})


@dataclass(frozen=True)
class Strike:
    """A fault that has struck.

    Attributes:
        time: in seconds since the epoch.
        step: newest step that was logged before it.
        resumed_step: step from which the workers of that moment had gone on.
        note: whom it hit.
        damaged_step: of the checkpoint that it damaged.
    """

    fault: Fault
    time: float
    step: int
    resumed_step: int
    note: str = ""
    damaged_step: int | None = None


class Trace:
    """Follows a run after a strike.

    Lines are gathered as they appear: workers that go on from a checkpoint remove those of the steps after it. The
    attempts of a run are told apart by the step that they go on from, which a new checkpoint always moves.
    """

    def __init__(self, strike: Strike) -> None:
        self.strike = strike
        self._lines: dict[tuple[int, int], Mapping[str, Any]] = {}
        self._events: dict[float, str] = {}

    def look(self, metrics: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]]) -> None:
        """Take in what stands in the logs now."""
        since = self.strike.time
        self._lines |= {(line["resumed_step"], line["step"]): line for line in metrics if line["time"] > since}
        self._events |= {event["time"]: event["event"] for event in events if event["time"] > since}

    @property
    def detection_seconds(self) -> float | None:
        """From the fault to the first sign that it was noticed; None without one."""
        times = [time for time, event in self._events.items() if event in _NOTICED]
        if self.strike.fault in OUTAGES:
            times += [line["time"] for line in self._lines.values() if line["failed_checkpoints"]]
        return min(times) - self.strike.time if times else None

    @property
    def recovery_seconds(self) -> float | None:
        """From the fault to the first step after it; of an outage: to the first after which nothing is amiss."""
        line = self._recovered
        return line["time"] - self.strike.time if line is not None else None

    @property
    def resumed_step(self) -> int | None:
        """Step from which the workers first went on; None if they never stopped."""
        line = min(self._restarted, key=lambda line: line["time"], default=None)
        return line["resumed_step"] if line is not None else None

    @property
    def redone_steps(self) -> int:
        """Steps done again since the fault, by all attempts that logged one."""
        attempts = {line["resumed_step"]: line["redone_steps"] for line in self._restarted}
        return max(sum(attempts.values()), self.strike.step - min(attempts, default=self.strike.step))

    def has_settled(self, steps: int) -> bool:
        """Whether the newest workers have done so many steps since training went on."""
        line = self._recovered
        if line is None:
            return False
        newest = max(self._lines.values(), key=lambda line: line["time"])
        return newest["step"] >= max(line["step"], newest["resumed_step"], self.strike.step) + steps

    @property
    def _restarted(self) -> list[Mapping[str, Any]]:
        return [line for line in self._lines.values() if line["resumed_step"] != self.strike.resumed_step]

    @property
    def _recovered(self) -> Mapping[str, Any] | None:
        if self.strike.fault not in OUTAGES:
            return min(self._restarted, key=lambda line: line["time"], default=None)
        amiss = [line["time"] for line in self._lines.values() if line["failed_checkpoints"]]
        last = max(amiss, default=self.strike.time)
        whole = [line for line in self._lines.values() if line["time"] > last]
        return min(whole, key=lambda line: line["time"], default=None)
