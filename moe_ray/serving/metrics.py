"""Metrics of one replica in Prometheus' text format, computed when somebody asks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moe_ray.serving.engine.stats import EngineStats
from moe_ray.serving.usage import Usage

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_PREFIX = "moe_serve_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
# Those that may fall; all others count from the start.
_GAUGES = {
    "waiting",
    "running",
    "queued_tokens",
    "blocks_total",
    "blocks_used",
    "blocks_known",
    "tier_memory_bytes",
    "tier_disk_bytes",
    "response_cache_bytes",
    "response_memory_bytes",
    "response_disk_bytes",
    "expert_bytes_held",
}
NO_KEY = "none"


class Metrics:
    """Counts requests, and reads the engine when asked.

    Args:
        replica: the label of all of them.
        counts: dataclasses of more numbers.
    """

    def __init__(
        self, replica: str, stats: Callable[[], EngineStats], counts: "Sequence[DataclassInstance]" = ()
    ) -> None:
        self._replica = replica
        self._stats, self._counts = stats, counts
        self._registry = CollectorRegistry()
        self._registry.register(self)
        by_route = ("replica", "route")
        self._requests = Counter(
            f"{_PREFIX}http_requests", "Requests.", (*by_route, "status", "key"), registry=self._registry
        )
        self._tokens = Counter(
            f"{_PREFIX}key_tokens", "Tokens by API key.", ("replica", "key", "kind"), registry=self._registry
        )
        self._latency = Histogram(
            f"{_PREFIX}http_seconds", "Seconds of a request.", by_route, buckets=_SECONDS, registry=self._registry
        )
        self._first = Histogram(
            f"{_PREFIX}first_event_seconds",
            "Seconds to the first event of a stream.",
            by_route,
            buckets=_SECONDS,
            registry=self._registry,
        )

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

    def describe(self) -> Iterable[Metric]:
        """Called by the registry, which else would collect before there is an engine."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Called by the registry."""
        for numbers in (self._stats(), *self._counts):
            for field in fields(numbers):
                family = GaugeMetricFamily if field.name in _GAUGES else CounterMetricFamily
                metric = family(
                    _PREFIX + field.name, f"{type(numbers).__name__}.{field.name}.", labels=["replica"]
                )
                metric.add_metric([self._replica], getattr(numbers, field.name))
                yield metric
