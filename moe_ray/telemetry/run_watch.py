"""Observes a run by what it logs: each record and event becomes samples, at the moment that it tells."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from moe_ray.config import Config
from moe_ray.storage import Storage
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.records import is_step, time_of
from moe_ray.telemetry.rules import RULES
from moe_ray.telemetry.run_log import EVENTS, METRICS, LogTail
from moe_ray.telemetry.sample_store import KEPT_SECONDS, SampleStore
from moe_ray.telemetry.samples import EVENTS as EVENT_KINDS
from moe_ray.telemetry.samples import Sample, event_sample, training_samples

_SKIPPED = "moe_train_skipped_steps"
# No rule waits longer.
_REPLAYED_SECONDS = 600.0
# The load of each expert, of which no rule is made, would be most of what is kept.
_JUDGED = {term.metric for rule in RULES for term in rule.terms if CATALOGUE[term.metric].kind == "gauge"}


class RunWatch:
    """Follows the logs of one run; of one that has all its steps already it tells only what comes after.

    Args:
        since: what was logged until then, in Unix seconds, is not told.
    """

    def __init__(self, run: Storage, config: Config, since: float = float("-inf")) -> None:
        self._logs = LogTail(run, METRICS), LogTail(run, EVENTS)
        self.name = config.train.name
        self._config = config
        self._events: Counter[str] = Counter()
        self._skipped = 0.0
        self._gauges: list[Sample] = []
        self._seen = since
        self._unsaid: list[dict[str, Any]] = []
        self._at = float("-inf")
        self._is_over = self._is_counted = False

    def observe(self, store: SampleStore, now: float, told: Callable[[float], object] = lambda time: None) -> None:
        """Add what was logged since the last call; what the newest record says stays so until now.

        Args:
            told: called with the time of each record and event of the last ten minutes once its samples are there:
                what was before is no news.

        Raises:
            StorageError: the run's storage cannot be read now.
        """
        # Before, the clock may have been set back.
        self._at, self._seen = min(self._at, now), min(self._seen, now)
        items = self._news()
        if self._at == self._seen == float("-inf"):
            last_step = self._config.train.last_step
            self._is_over = any(item.get("step", 0) >= last_step for item in items if is_step(item))
        elif items:
            self._is_over = False
        if self._is_over:
            for item in items:
                self._take(item)
            self._at = now
            return
        for item in items:
            at = min(max(item["time"], self._at), now)
            if at <= now - KEPT_SECONDS:
                self._take(item)
                continue
            if not self._is_counted:
                # Before it was counted, nothing was: the first count is an increase too.
                store.add(at - 1e-3, self._counts())
            self._take(item)
            self._is_counted = True
            self._seen = min(item["time"], now)
            store.add(at, [*self._gauges, *self._counts()])
            self._at = at
            if at > now - _REPLAYED_SECONDS:
                told(at)
        self._at, self._is_counted = now, True
        store.add(self._at, [*self._gauges, *self._counts()])

    def _news(self) -> list[dict[str, Any]]:
        for log in self._logs:
            # Kept where the other log cannot be read now.
            self._unsaid += [item for item in log.new() if time_of(item) is not None]
        items, self._unsaid = self._unsaid, []
        whole = (item for item in items if item["time"] > self._seen and ("event" in item or is_step(item)))
        return sorted(whole, key=lambda item: item["time"])

    def _take(self, item: dict[str, Any]) -> None:
        if "event" in item:
            self._events[str(item["event"])] += 1
            return
        samples = training_samples(item, self._config)
        self._skipped += sum(sample.value for sample in samples if sample.name == _SKIPPED)
        self._gauges = [sample for sample in samples if sample.name in _JUDGED]

    def _counts(self) -> list[Sample]:
        run = self._config.train.name
        events = [event_sample(run, kind, self._events[kind]) for kind in EVENT_KINDS]
        return [Sample(_SKIPPED, {"run": run}, self._skipped), *events]
