"""What happens to the workers of a run."""

import logging
import time
from typing import Any

from moe_ray.config import Config
from moe_ray.ray_metrics import RayMetrics
from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import EVENTS as EVENTS_LOG
from moe_ray.telemetry.run_log import RunLog
from moe_ray.telemetry.samples import EVENTS, event_sample

_logger = logging.getLogger(__name__)


class Events:
    """What happened to the workers of a run, as lines of its events.jsonl and of the log, and as counters."""

    def __init__(self, config: Config) -> None:
        self._log = RunLog(open_storage(config.train.run_uri, config.checkpoint.retry_seconds), EVENTS_LOG)
        self._run = config.train.name
        self._metrics = RayMetrics()
        self._metrics.send(event_sample(self._run, event, times=0) for event in EVENTS)

    def add(self, event: str, text: str, **details: Any) -> None:
        """Note an event.

        Args:
            event: its kind.
            text: the same for people.
            details: numbers and names.
        """
        _logger.info("%s", text)
        self._log.append({"event": event, "time": time.time(), **details})
        self._metrics.send([event_sample(self._run, event)])
