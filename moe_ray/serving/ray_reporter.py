"""Tell Ray's metrics agent every few seconds what a replica has done."""

import logging
import threading

from moe_ray.ray_metrics import RayMetrics
from moe_ray.serving.metrics import Growth, Metrics

_SECONDS = 5.0
_logger = logging.getLogger(__name__)


class RayReporter:
    """A thread that sends the metrics of a replica, from its start until it is closed."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ray, self._growth = RayMetrics(), Growth()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ray-reporter", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what is left."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._closing.wait(_SECONDS)
            try:
                self._ray.send(self._growth.samples(self._metrics.families()))
            except Exception:
                # Requests are answered whoever counts them.
                _logger.exception("the metrics could not be sent to Ray's agent")
