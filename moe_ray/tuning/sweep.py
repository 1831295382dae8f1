"""A sweep from its settings to its best trial; the same again goes on with one that was interrupted."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import ray
import yaml
from ray.tune.schedulers import FIFOScheduler

from moe_ray.config import Config, build_config, to_yaml
from moe_ray.data.prepare import prepare
from moe_ray.errors import ConfigError, TrainingError
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.ray_metrics import RayMetrics
from moe_ray.storage import Storage, open_storage
from moe_ray.storage.lease import hold
from moe_ray.telemetry.run_log import RUN_SETTINGS, SWEEP_SETTINGS, read_metrics
from moe_ray.telemetry.samples import Sample
from moe_ray.training.cluster_view import count_slots
from moe_ray.training.launcher import connect, with_absolute_storage
from moe_ray.training.trainer import StopSwitch, stop_on_signals
from moe_ray.tuning.board import Board
from moe_ray.tuning.check import check_sweep
from moe_ray.tuning.outcome import best_trial, write_outcome
from moe_ray.tuning.population import run_population
from moe_ray.tuning.search import Search
from moe_ray.tuning.space import resolve
from moe_ray.tuning.table import Table
from moe_ray.tuning.trials import Status, Trial, damaged
from moe_ray.tuning.tuner import Work, asha, run_trials

_logger = logging.getLogger(__name__)
_PUBLISH_SECONDS = 60.0
# What may change when a sweep goes on.
_FREE = {"sweep": {"trials", "concurrent", "retries"}, "telemetry": None, "serve": None}
# What has an effect with one scheduler alone.
_OF_SCHEDULERS = {"grace_steps": "asha", "reduction_factor": "asha", "perturb_steps": "pbt"}


def run_sweep(config: Config) -> Board:
    """Run the trials of a sweep, or those that are left, and write `best.yaml`.

    Returns:
        All trials.

    Raises:
        ConfigError: a setting is wrong, or the sweep was begun with other settings.
        TrainingError: a signal ended the sweep, or no trial has an objective.
    """
    config = resolve_model(with_absolute_storage(config))
    check_sweep(config)
    storage, switch = open_storage(config.train.run_uri), StopSwitch()
    with hold(storage):
        if storage.exists(RUN_SETTINGS):
            raise ConfigError(f"{storage.uri!r} is the folder of a run.", "set another train.name.")
        _check_unchanged(config, storage)
        storage.write(SWEEP_SETTINGS, to_yaml(config).encode())
        board = _board(config, storage)
        if len(board.trials) >= config.sweep.trials and not _unfinished(board):
            _logger.info("all %d trials have ended; nothing to do", len(board.trials))
            write_outcome(board)
            return board
        if board.trials:
            waiting = len(_unfinished(board))
            _logger.info("going on: %d trials have ended, %d have not", len(board.trials) - waiting, waiting)
        _connect(config)
        # Ray has just put handlers of its own in place.
        with stop_on_signals(switch), Table(board) as table:
            work = Work(
                take=lambda: None,
                settings=_Settings(config),
                room=_room(config),
                ended=_publisher(board),
                show=_shower(board, table),
            )
            if config.sweep.scheduler == "pbt":
                run_population(board, work, switch)
            else:
                _search(board, work, switch)
            board.put(*(replace(trial, status="pending") for trial in board.with_status("running")))
    write_outcome(board)
    if switch.is_pressed:
        raise TrainingError(
            "a signal ended the sweep; trials that had begun to train have saved.",
            "run the same command to go on.",
        )
    return board


def _unfinished(board: Board) -> list[Trial]:
    """Trials that wait, or of a population have finished a generation that is not the last."""
    finished = board.with_status("finished")
    return board.with_status("pending") + [trial for trial in finished if trial.steps < board.last_step(trial)]


def _shower(board: Board, table: Table) -> Callable[[], None]:
    metrics = RayMetrics()

    def show() -> None:
        table.update()
        metrics.send(sweep_samples(board))

    return show


def sweep_samples(board: Board) -> list[Sample]:
    """What Prometheus hears of a sweep."""
    run, trials, best = {"run": board.config.train.name}, board.trials.values(), best_trial(board)
    found = [
        Sample("moe_sweep_trials", run | {"status": status}, sum(trial.status == status for trial in trials))
        for status in get_args(Status)
    ]
    found.append(Sample("moe_sweep_steps", run, sum(trial.steps for trial in trials)))
    if best is not None:
        found.append(Sample("moe_sweep_best", run, best.metrics[board.config.sweep.metric]))
    return found


def _search(board: Board, work: Work, switch: StopSwitch) -> None:
    config, past = board.config, list(board.trials.values())
    search, waiting = Search(config, past), board.with_status("pending")

    def take() -> Trial | None:
        if waiting:
            return waiting.pop(0)
        while (trial := search.propose()) is not None:
            board.put(trial)
            if trial.status != "infeasible":
                return trial
        return None

    scheduler = FIFOScheduler()
    if config.sweep.scheduler == "asha":
        ended = [trial for trial in past if trial.status != "pending"]
        scheduler = asha(config, {t.number: read_metrics(board.storage.child(t.run)) for t in ended})

    def ended(trial: Trial) -> None:
        search.tell(trial)
        work.ended(trial)

    run_trials(board, replace(work, take=take, ended=ended), scheduler, switch)


def _publisher(board: Board) -> Callable[[Trial], None]:
    """Writes what is known when a trial has ended, though not too often."""
    written_at = time.monotonic()

    def publish(_: Trial) -> None:
        nonlocal written_at
        if board.with_status("pending", "running") and time.monotonic() - written_at > _PUBLISH_SECONDS:
            write_outcome(board)
            written_at = time.monotonic()

    return publish


def _check_unchanged(config: Config, storage: Storage) -> None:
    """A sweep goes on only with the trials that it would have had."""
    try:
        content = storage.read(SWEEP_SETTINGS)
    except FileNotFoundError:
        return
    try:
        tree = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict):
        raise damaged(storage, SWEEP_SETTINGS, "it holds no settings")
    try:
        before = build_config(tree)
    except ConfigError as error:
        raise damaged(storage, SWEEP_SETTINGS, error.problem.rstrip(".")) from None
    now, then = config.model_dump(mode="json"), before.model_dump(mode="json")
    for section, fields in now.items():
        free = _FREE.get(section, set())
        if section == "sweep" and config.sweep.auto:
            free = {"concurrent", "retries"}
        if free is None:
            continue
        if section == "sweep":
            free = free | {name for name, of in _OF_SCHEDULERS.items() if config.sweep.scheduler != of}
        for name, value in fields.items():
            if value != then[section][name] and name not in free:
                raise ConfigError(
                    f"{section}.{name}={value!r} differs from the sweep in {storage.uri!r}, which has "
                    f"{then[section][name]!r}.",
                    "keep the value to go on with the sweep, or set another train.name to start a new one.",
                )


def _board(config: Config, storage: Storage) -> Board:
    """The trials of an earlier start; those that ran, or may be tried again, wait."""
    board = Board(config, storage)
    board.put(
        *(
            replace(trial, status="pending")
            for trial in board.with_status("running", "failed")
            if trial.status == "running" or trial.attempts <= config.sweep.retries
        )
    )
    return board


def _connect(config: Config) -> None:
    """Join or start a cluster; one that is started fits the trials that are to run at once."""
    parallel, concurrent = config.parallel, config.sweep.concurrent
    if isinstance(concurrent, int):
        parallel = parallel.model_copy(update={"workers": parallel.max_workers * concurrent})
    connect(parallel, log_to_driver=False)


def _room(config: Config) -> Callable[[], int]:
    """How many trials at once: given, or as many as fit on what the cluster has free now and on nodes to come."""
    concurrent, parallel = config.sweep.concurrent, config.parallel
    if isinstance(concurrent, int):
        return lambda: concurrent
    per_worker = {"CPU": parallel.cpus_per_worker} | ({"GPU": 1} if parallel.use_gpu else {})
    free, total = count_slots(per_worker, {}), _total(per_worker)
    return lambda: (free + _total(per_worker) - total) // parallel.min_workers


def _total(per_worker: dict[str, float]) -> int:
    has = ray.cluster_resources()
    return min(math.floor(has.get(name, 0.0) / amount + 1e-6) for name, amount in per_worker.items())


class _Settings:
    """Settings of the run of a trial; data are prepared once for all trials that need the same."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._prepared: dict[Any, str] = {}

    def __call__(self, trial: Trial) -> Config:
        config = resolve(self._config, trial.values)
        key = (config.data.model_dump_json(), config.model.vocab_size)
        if key not in self._prepared:
            self._prepared[key] = str(prepare(config))
        train = {"name": trial.run, "storage": self._config.train.run_uri}
        return config.model_copy(
            update={
                "train": config.train.model_copy(update=train),
                "data": config.data.model_copy(update={"path": self._prepared[key]}),
            }
        )
