"""Samples of metrics by time, for as long as rules look back, with the meaning that Prometheus gives them."""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moe_ray.telemetry.samples import Sample

LOOKBACK_SECONDS = 300.0
KEPT_SECONDS = 3700.0
Labels = tuple[tuple[str, str], ...]


@dataclass
class _Series:
    """Ascending times in seconds, and values; None where the series has ended."""

    times: list[float] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)


class SampleStore:
    """Series by metric and labels."""

    def __init__(self) -> None:
        self._series: dict[str, dict[Labels, _Series]] = defaultdict(dict)
        self._of_source: dict[str, set[tuple[str, Labels]]] = defaultdict(set)

    def add(self, time: float, samples: Iterable[Sample], source: str | None = None) -> None:
        """Add what was observed at a time; what the same series has of later ones is of a clock since set back.

        Args:
            samples: of counters, what they have counted from their start.
            source: what was observed as a whole: series of its last observation that are not in this one end.
        """
        seen = set()
        for name, labels, value in samples:
            key = name, tuple(sorted(labels.items()))
            self._append(*key, time, value)
            seen.add(key)
        if source is not None:
            for metric, labels in self._of_source[source] - seen:
                self._append(metric, labels, time, None)
            self._of_source[source] = seen

    def at(self, metric: str, now: float) -> Iterator[tuple[Labels, float]]:
        """The newest value of each series that has one within `LOOKBACK_SECONDS` and has not ended."""
        for labels, series in self._series.get(metric, {}).items():
            index = bisect_right(series.times, now) - 1
            if index >= 0 and series.times[index] > now - LOOKBACK_SECONDS:
                value = series.values[index]
                if value is not None:
                    yield labels, value

    def window(
        self, metric: str, now: float, seconds: float
    ) -> Iterator[tuple[Labels, list[tuple[float, float]]]]:
        """(time, value) of each series with any after `now - seconds` and until now."""
        for labels, series in self._series.get(metric, {}).items():
            begin, end = bisect_right(series.times, now - seconds), bisect_right(series.times, now)
            pairs = zip(series.times[begin:end], series.values[begin:end], strict=True)
            points = [(time, value) for time, value in pairs if value is not None]
            if points:
                yield labels, points

    def forget(self, now: float) -> None:
        """Remove what no rule looks back to."""
        for by_labels in self._series.values():
            for labels, series in list(by_labels.items()):
                old = bisect_left(series.times, now - KEPT_SECONDS)
                del series.times[:old], series.values[:old]
                if not series.times:
                    del by_labels[labels]

    def _append(self, metric: str, labels: Labels, time: float, value: float | None) -> None:
        if value is not None and math.isnan(value):
            value = None
        series = self._series[metric].setdefault(labels, _Series())
        while series.times and series.times[-1] > time:
            del series.times[-1], series.values[-1]
        if series.times and series.times[-1] == time:
            series.values[-1] = value
        else:
            series.times.append(time)
            series.values.append(value)
