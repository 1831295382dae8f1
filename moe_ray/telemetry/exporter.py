"""Serves what a watcher knows: `/metrics` for Prometheus and `/healthz` for probes and people."""

import json
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from moe_ray.errors import ConfigError
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.health import Status
from moe_ray.telemetry.sample_store import SampleStore
from moe_ray.telemetry.watcher import Watcher

_OURS = tuple(metric for metric in CATALOGUE.values() if metric.source == "monitor")


class Exporter:
    """Answers from the last round; a round that goes on holds no answer up.

    Attributes:
        metrics: text of `/metrics`.
        health: JSON of `/healthz`.
    """

    def __init__(self) -> None:
        self.metrics = b""
        self.health = b"{}"
        self.status = HTTPStatus.SERVICE_UNAVAILABLE

    def show(self, watcher: Watcher, now: float) -> None:
        """Answer with what a watcher knows now."""
        registry = CollectorRegistry()
        registry.register(_Collector(watcher.store, now))
        health = watcher.health
        self.metrics = generate_latest(registry)
        self.health = json.dumps({"time": now, **health.record()}).encode()
        is_bad = health.status is Status.UNHEALTHY
        self.status = HTTPStatus.SERVICE_UNAVAILABLE if is_bad else HTTPStatus.OK

    def answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        """Status, content type and body for a GET."""
        match path.partition("?")[0]:
            case "/metrics":
                return HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, self.metrics
            case "/healthz":
                return self.status, "application/json", self.health
            case _:
                return HTTPStatus.NOT_FOUND, "text/plain", b"/metrics and /healthz are here.\n"


@contextmanager
def serve(exporter: Exporter, host: str, port: int) -> Generator[int]:
    """Answer HTTP while the block runs; gives the port, a free one for 0.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            status, content_type, body = exporter.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are no news."""

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the monitor cannot listen on {host}:{port}: {reason}.", "give another --port or --host."
        ) from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="exporter", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Collector:
    """The monitor's own metrics; those of runs and replicas go through Ray."""

    def __init__(self, store: SampleStore, now: float) -> None:
        self._store = store
        self._now = now

    def collect(self) -> Iterator[Metric]:
        """Each with its series."""
        for metric in _OURS:
            family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, value in self._store.at(metric.name, self._now):
                family.add_metric([dict(labels)[name] for name in metric.labels], value)
            if family.samples:
                yield family
