"""Hand a run's metrics to its trackers from a thread, so that none of them slows or ends training."""

import importlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from moe_ray.config import Config
from moe_ray.errors import ConfigError
from moe_ray.storage import Storage
from moe_ray.telemetry.trackers.run import Log, TrackedRun, tracked_numbers, tracking_id

_MODULES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
# What waits while a tracker is slow; a record more is dropped, as training goes on.
_MOST_RECORDS = 1000
_CLOSE_SECONDS = 30.0
_Result = TypeVar("_Result")
_logger = logging.getLogger(__name__)


def check_trackers(config: Config) -> None:
    """See that every tracker can be imported.

    Raises:
        ConfigError: one is not installed.
    """
    for name in config.telemetry.trackers:
        if importlib.util.find_spec(_MODULES[name]) is None:
            raise ConfigError(
                f"telemetry.trackers names {name!r}, which is not installed.", f"pip install 'moe_ray[{name}]'."
            )


@contextmanager
def follow_run(config: Config, run: Storage) -> Generator[Callable[[Mapping[str, Any]], None]]:
    """Start what takes the records of metrics.jsonl; when the block ends, wait a while for the trackers."""
    if not config.telemetry.trackers:
        yield lambda record: None
        return
    records: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_MOST_RECORDS)
    thread = threading.Thread(target=_pass_on, args=(config, run, records), name="trackers", daemon=True)
    thread.start()
    is_full = False

    def take(record: Mapping[str, Any]) -> None:
        nonlocal is_full
        try:
            records.put_nowait(dict(record))
        except queue.Full:
            if not is_full:
                _logger.warning("the trackers are too slow; records that they have no room for are left out")
            is_full = True

    try:
        yield take
    finally:
        try:
            records.put(None, timeout=_CLOSE_SECONDS)
            thread.join(_CLOSE_SECONDS)
        except queue.Full:
            pass
        if thread.is_alive():
            _logger.warning("the trackers did not take all records within %g s", _CLOSE_SECONDS)


def _pass_on(config: Config, run: Storage, records: "queue.Queue[Mapping[str, Any] | None]") -> None:
    first = records.get()
    if first is None:
        return
    with ExitStack() as stack:
        logs: dict[str, Log] = {}
        for name in config.telemetry.trackers:
            log = _attempt(name, partial(_start, name, config, run, first["resumed_step"], stack))
            if log is not None:
                logs[name] = log
        record: Mapping[str, Any] | None = first
        while record is not None:
            numbers = tracked_numbers(record, config)
            for name in list(logs):
                if not _attempt(name, partial(_send, logs[name], record["step"], numbers)):
                    del logs[name]
            record = records.get()


def _start(name: str, config: Config, run: Storage, resumed_step: int, stack: ExitStack) -> Log:
    given = config.telemetry.tracking_folder
    folder = config.train.run_dir / "trackers" if given is None else Path(given).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    module = importlib.import_module(f"moe_ray.telemetry.trackers.{name}")
    tracker = module.track(TrackedRun(config, tracking_id(run), folder, resumed_step))
    log = tracker.__enter__()
    stack.callback(_attempt, name, partial(tracker.__exit__, None, None, None))
    return log


def _send(log: Log, step: int, numbers: Mapping[str, float]) -> bool:
    log(step, numbers)
    return True


def _attempt(name: str, action: Callable[[], _Result]) -> _Result | None:
    """A tracker that fails is told no more."""
    try:
        return action()
    except Exception as error:
        _logger.warning("%s failed and is told no more of this run; training goes on: %r", name, error)
        return None
