"""Metrics of one replica: in Prometheus' text format when somebody asks, and as they grow for Ray's agent."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import groupby, repeat
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.core import Sample as Reading

from moe_ray.serving.engine.stats import EngineStats
from moe_ray.serving.usage import Usage
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.samples import Sample

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PREFIX = "moe_serve_"
_Kind = TypeVar("_Kind", Counter, Histogram)
NO_KEY = "none"


class Metrics:
    """Counts requests, and reads the engine when asked.

    Args:
        replica: the label of all of them.
        counts: dataclasses of more numbers.
    """

    def __init__(self, replica: str = "local", counts: "Sequence[DataclassInstance]" = ()) -> None:
        self._replica = replica
        self._stats: Callable[[], EngineStats] | None = None
        self._counts = counts
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = self._make(Counter, "http_requests")
        self._tokens = self._make(Counter, "key_tokens")
        self._latency = self._make(Histogram, "http_seconds")
        self._first = self._make(Histogram, "first_event_seconds")

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Read this engine from now on."""
        self._stats = stats

    def count(self, route: str, status: str, usage: Usage, seconds: float, first_seconds: float | None) -> None:
        """Count a request that has ended."""
        name = usage.key.name if usage.key else NO_KEY
        self._requests.labels(self._replica, route, status, name).inc()
        self._latency.labels(self._replica, route).observe(seconds)
        if first_seconds is not None:
            self._first.labels(self._replica, route).observe(first_seconds)
        for kind, tokens in (("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)):
            if tokens:
                self._tokens.labels(self._replica, name, kind).inc(tokens)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)

    def families(self) -> Iterable[Family]:
        """All metrics."""
        return self._registry.collect()

    def describe(self) -> Iterable[Family]:
        """Called by the registry, which else would collect before there is an engine."""
        return ()

    def collect(self) -> Iterable[Family]:
        """Called by the registry."""
        for numbers in (*([self._stats()] if self._stats else []), *self._counts):
            for field in fields(numbers):
                metric = CATALOGUE[_PREFIX + field.name]
                family = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
                found = family(metric.name, metric.help, labels=metric.labels)
                found.add_metric([self._replica], getattr(numbers, field.name))
                yield found

    def _make(self, kind: type[_Kind], name: str) -> _Kind:
        metric = CATALOGUE[_PREFIX + name]
        buckets: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
        return kind(metric.name, metric.help, metric.labels, registry=self._registry, **buckets)


class Growth:
    """Turns readings of metrics, which count from a start, into samples of what has changed since the last ones.

    Requests then cost nothing for Ray's agent, which is told every few seconds instead of with each of them. It
    keeps of an observation of a histogram only the bucket, so what it is told is the bucket's upper bound.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[str, ...], float] = {}

    def samples(self, families: Iterable[Family]) -> Iterator[Sample]:
        """What to send."""
        for family in families:
            if family.type == "gauge":
                yield from (Sample(family.name, reading.labels, reading.value) for reading in family.samples)
            elif family.type == "counter":
                totals = (reading for reading in family.samples if reading.name == f"{family.name}_total")
                yield from (Sample(family.name, reading.labels, self._grown(reading)) for reading in totals)
            else:
                yield from self._observations(family)

    def _observations(self, family: Family) -> Iterator[Sample]:
        buckets = (reading for reading in family.samples if reading.name == f"{family.name}_bucket")
        for labels, series in groupby(buckets, _without_bound):
            fewer = last = 0.0
            for reading in series:
                bound, count = float(reading.labels["le"]), self._grown(reading)
                # What is above the last bound needs one too.
                last = bound if math.isfinite(bound) else 2 * last
                yield from repeat(Sample(family.name, labels, last), round(count - fewer))
                fewer = count

    def _grown(self, reading: Reading) -> float:
        """By how much; from 0 if it is new, or less than before as an engine has taken the place of another."""
        key = (reading.name, *reading.labels.values())
        before, self._before[key] = self._before.get(key, 0.0), reading.value
        return reading.value - before if reading.value >= before else reading.value


def _without_bound(reading: Reading) -> dict[str, str]:
    return {name: value for name, value in reading.labels.items() if name != "le"}
