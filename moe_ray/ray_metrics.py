"""Send samples of the catalogue's metrics to Ray's metrics agent, which Prometheus finds through Ray."""

import logging
from collections.abc import Iterable, Mapping

from ray.util.metrics import Counter, Gauge, Histogram

from moe_ray.telemetry.catalogue import CATALOGUE, Metric
from moe_ray.telemetry.samples import Sample

_logger = logging.getLogger(__name__)
# A counter whose first value is 1 shows no increase to Prometheus. Ray adds nothing that is not above 0, and this
# is 0 in every sum.
_ZERO = 5e-324


class RayMetrics:
    """The metrics of this process, which must be one of Ray's.

    Ray goes on sending a gauge as long as the process lives, and forgets it half a minute after that; counters and
    histograms stay with the node's agent.
    """

    def __init__(self) -> None:
        self._instruments: dict[str, Counter | Gauge | Histogram] = {}
        self._series: dict[str, set[tuple[str, ...]]] = {}
        self._full: set[str] = set()

    def send(self, samples: Iterable[Sample]) -> None:
        """Send samples; a 0 makes a counter known, so that its first increase is seen as one."""
        for name, labels, value in samples:
            metric = _known(name, labels)
            is_new = self._is_new(metric, labels)
            if is_new is None:
                continue
            instrument = self._instruments.get(name) or self._make(metric)
            if isinstance(instrument, Gauge):
                instrument.set(value, dict(labels))
            elif isinstance(instrument, Histogram):
                instrument.observe(value, dict(labels))
            elif value or is_new:
                instrument.inc(value or _ZERO, dict(labels))

    def _make(self, metric: Metric) -> Counter | Gauge | Histogram:
        if metric.kind == "histogram":
            made: Counter | Gauge | Histogram = Histogram(
                metric.name, metric.help, list(metric.buckets), metric.labels
            )
        else:
            made = (Counter if metric.kind == "counter" else Gauge)(metric.name, metric.help, metric.labels)
        self._instruments[metric.name] = made
        return made

    def _is_new(self, metric: Metric, labels: Mapping[str, str]) -> bool | None:
        """Whether these labels were not sent yet; None if there are too many others."""
        series = self._series.setdefault(metric.name, set())
        key = tuple(labels.values())
        if key in series:
            return False
        if len(series) == metric.series:
            if metric.name not in self._full:
                _logger.warning("%s has more than %d series; more are left out", metric.name, metric.series)
            self._full.add(metric.name)
            return None
        series.add(key)
        return True


def _known(name: str, labels: Mapping[str, str]) -> Metric:
    metric = CATALOGUE.get(name)
    assert metric is not None, f"{name} is not in the catalogue"
    assert tuple(labels) == metric.labels, f"{name} has the labels {metric.labels}, not {tuple(labels)}"
    return metric
