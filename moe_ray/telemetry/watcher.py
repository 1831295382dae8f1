"""Observes, evaluates the rules and tells of alerts, round after round."""

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from moe_ray.config import Config
from moe_ray.errors import StorageError
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.alerts import Alert, Alerts
from moe_ray.telemetry.health import Health, health
from moe_ray.telemetry.host import StorageProbe, host_samples
from moe_ray.telemetry.notify import Notify, log_alert, open_webhook, tell
from moe_ray.telemetry.rules import IN_PROCESS, Component, Rule
from moe_ray.telemetry.run_log import ALERTS, RunLog
from moe_ray.telemetry.run_watch import RunWatch
from moe_ray.telemetry.sample_store import SampleStore
from moe_ray.telemetry.samples import Sample

_logger = logging.getLogger(__name__)
Observe = Callable[[float], Iterable[Sample]]


class Watcher:
    """What is known, and which alerts follow from it.

    Args:
        rules: those that are evaluated.
        runs: logs that are followed.
        observers: by name, what else is observed each round.
        notify: told of each alert.
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        runs: Sequence[RunWatch] = (),
        observers: Mapping[str, Observe] | None = None,
        notify: Sequence[Notify] = (),
    ) -> None:
        self.store = SampleStore()
        self.alerts = Alerts(rules)
        self._runs = runs
        self._observers = observers or {}
        self._notify = notify
        self._components: list[Component] = list(dict.fromkeys(rule.component for rule in rules))
        self._failing: dict[str, str] = {}

    @property
    def health(self) -> Health:
        """As of the last round."""
        return health(self.alerts.active(), self._components)

    def round(self, now: float) -> None:
        """Observe all, evaluate and tell."""
        for run in self._runs:
            self._try(f"run {run.name}", lambda run=run: run.observe(self.store, now, self._evaluate))
        for name, observe in self._observers.items():
            self._try(name, lambda name=name, observe=observe: self.store.add(now, observe(now), name))
        self.store.add(now, self._errors())
        self._evaluate(now)
        self.store.add(now, [*self.health.samples(), *self.alerts.samples()])
        self.store.forget(now)

    def _evaluate(self, now: float) -> None:
        tell(self.alerts.update(self.store, now), self._notify)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        """What cannot be observed is said once, and is an alert of its own."""
        try:
            action()
        # Whatever a cluster, a driver or a network comes up with, the rest is watched on.
        except Exception as error:
            if name not in self._failing:
                _logger.warning("%s cannot be observed: %s", name, error)
            self._failing[name] = str(error)
        else:
            self._failing.pop(name, None)

    def _errors(self) -> Iterable[Sample]:
        names = [*(f"run {run.name}" for run in self._runs), *self._observers]
        return [Sample("moe_monitor_errors", {"source": name}, float(name in self._failing)) for name in names]


def storage_samples(name: str, storage: StorageProbe) -> list[Sample]:
    """Whether the storage of a run takes a file."""
    problem = storage.problem()
    if problem:
        _logger.debug("the storage of %s: %s", name, problem)
    return [Sample("moe_storage_reachable", {"run": name}, float(problem is None))]


@contextmanager
def watch_training(run: Storage, config: Config) -> Generator[None]:
    """Watch a run from its driver while the block runs.

    Alerts go to the log, to the run's `alerts.jsonl` and to the webhook, if there is one.

    Raises:
        ConfigError: the webhook is not allowed.
    """
    if not config.telemetry.alerts:
        yield
        return
    webhook, log = open_webhook(config.telemetry.webhook_file), RunLog(run, ALERTS)
    notify: list[Notify] = [log_alert, lambda alert: log.append(_event(alert))]
    # Storage that does not answer is to be told of at once, not when it has been tried for long.
    impatient = open_storage(config.train.run_uri, retry_seconds=1.0)
    watcher = training_watcher(impatient, config, notify if webhook is None else [*notify, webhook])
    done = threading.Event()

    def follow() -> None:
        while not done.wait(config.telemetry.check_seconds):
            watcher.round(time.time())

    thread = threading.Thread(target=follow, name="watch-training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        watcher.round(time.time())
        try:
            log.close()
        except StorageError as error:
            _logger.warning("%s", error)
        if webhook is not None:
            webhook.close()


def training_watcher(run: Storage, config: Config, notify: Sequence[Notify]) -> Watcher:
    """What a training command watches: its run from now on, the run's storage and this machine."""
    name = config.train.name
    probe = StorageProbe(config.train.run_uri)
    folders = [Path(run.local)] if run.local is not None else []
    observers: dict[str, Observe] = {
        "host": lambda now: host_samples(folders),
        "storage": lambda now: storage_samples(name, probe),
    }
    components = {"training", "experts", "checkpoint", "storage", "host", "monitor"}
    rules = [rule for rule in IN_PROCESS if rule.component in components]
    return Watcher(rules, [RunWatch(run, config, since=time.time())], observers, notify)


def _event(alert: Alert) -> dict[str, object]:
    """A line of the run's events."""
    kind = "resolved" if alert.state == "resolved" else "alert"
    return {"event": kind, "time": time.time(), **alert.record()}
