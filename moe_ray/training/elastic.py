"""Ray Train's controller with our answers to its two questions: how many workers, and whether to try again.

Before it changes the world it asks the workers for a checkpoint, where Ray Train's own restarts from the last one.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import ray
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from moe_ray.checkpoint.catalog import list_steps
from moe_ray.config import Config, build_config
from moe_ray.errors import MoeRayError, StorageError
from moe_ray.storage import open_storage
from moe_ray.submission import Submission
from moe_ray.telemetry.logs import setup_logging
from moe_ray.training.events import Events
from moe_ray.training.failures import our_error, root_causes
from moe_ray.training.requests import Request, ask, restart_on_sigterm
from moe_ray.training.world_policy import WorldPolicy

_logger = logging.getLogger(__name__)
_KILL_SECONDS = 5.0
# What a worker raises for a mistake in code, such as that of a router of the user's own: no restart mends it.
_BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)


class RetryPolicy(FailurePolicy):
    """Try again whatever may pass by itself; give up on what the user must mend, and on what never gets on."""

    def __init__(
        self, failure_config: Any, config: Config, events: Events, delay: Callable[[float], None]
    ) -> None:
        super().__init__(failure_config)
        self._run = open_storage(config.train.run_uri, retry_seconds=1.0)
        self._delay = delay
        self._limit = config.parallel.max_failures
        self._events = events
        self._failures = 0
        self._saved_at_failure = -1

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether the workers are started again."""
        if isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, WorkerGroupStartupTimeoutError
        ):
            return FailureDecision.RETRY  # nodes left meanwhile: the next count knows
        causes = root_causes(training_failed_error)
        error = our_error(causes)
        saved = self._newest_saved_step()
        self._failures = self._failures + 1 if saved <= self._saved_at_failure else 1
        self._saved_at_failure = max(saved, self._saved_at_failure)
        is_bug = error is None and any(isinstance(cause, _BUGS) for cause in causes)
        retry = not is_bug and isinstance(error, StorageError | None) and self._failures <= self._limit
        if isinstance(error, StorageError):
            self._delay(2.0**self._failures)
        ranks = (
            sorted(training_failed_error.worker_failures)
            if isinstance(training_failed_error, WorkerGroupError)
            else []
        )
        dead = [cause for cause in causes if isinstance(cause, WorkerHealthCheckFailedError)]
        reason = _one_line(error or next(iter([*dead, *causes]), training_failed_error))
        self._events.add(
            "failure",
            f"workers {ranks} failed ({reason}); {'starting again' if retry else 'giving up'}",
            reason=reason,
            ranks=ranks,
            retry=retry,
            saved_step=saved,
        )
        return FailureDecision.RETRY if retry else FailureDecision.RAISE

    def _newest_saved_step(self) -> int:
        """How far the run has come for good; what was not saved will be done again."""
        try:
            return max(list_steps(self._run), default=0)
        except StorageError:
            return 0


class _TakeNotice(WorkerGroupCallback):
    """SIGTERM is a notice from a worker's first step on."""

    def after_worker_group_start(self, worker_group: Any) -> None:
        worker_group.execute(restart_on_sigterm)


class ElasticController(TrainController):
    """Runs on the driver's node as an actor, for as long as the driver lives."""

    def __init__(
        self,
        *,
        settings: dict[str, Any],
        submission: Submission | None,
        train_run_context: Any,
        callbacks: list[Any],
        **rest: Any,
    ) -> None:
        config = build_config(settings)
        job = ray.get_runtime_context().get_job_id()
        id = submission.id if submission is not None else None
        setup_logging(config.telemetry, run=config.train.name, job=job, submission=id)
        self._settings = config
        self._events = Events(config)
        if submission is not None:
            self._events.add("job", f"job {id} trains", submission=id, metadata=submission.metadata)
        self._policy = WorldPolicy(
            train_run_context.scaling_config,
            config,
            self._events,
            save_only=lambda: self._ask(Request.SAVE),
            release=self._release,
        )
        retry = RetryPolicy(train_run_context.run_config.failure_config, config, self._events, self._policy.delay)
        rest |= {"scaling_policy": self._policy, "failure_policy": retry}
        super().__init__(train_run_context=train_run_context, callbacks=[*callbacks, _TakeNotice()], **rest)

    async def stop(self) -> None:
        """Ask the workers to save and end; without any, end at once."""
        self._events.add("stop", "a signal asked the run to save and end")
        self._policy.is_stopping = True
        self._ask(Request.STOP)

    @staticmethod
    def _is_training_succeeded(worker_group_status: Any) -> bool:
        return TrainController._is_training_succeeded(worker_group_status) and all(
            status.return_value.request is not Request.RESTART
            for status in worker_group_status.worker_statuses.values()
        )

    def _execute_resize_decision(self, decision: ResizeDecision) -> Any:
        group = self.get_worker_group()
        status = group.get_latest_poll_status() if group is not None else None
        if group is not None and status is not None:
            if status.errors:
                _kill_silent(group, status)
            elif not status.finished:
                self._save_before(decision.num_workers)
        self._policy.held = {}
        return super()._execute_resize_decision(decision)

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict) -> None:
        super()._start_worker_group(num_workers, resources_per_worker)
        group = self.get_worker_group()
        assert group is not None
        self._policy.held = Counter(worker.metadata.node_id for worker in group.get_workers())
        self._events.add("start", f"{num_workers} workers train", workers=num_workers)
        if self._policy.is_stopping:
            self._ask(Request.STOP)

    def _release(self) -> None:
        group = self.get_worker_group()
        if group is not None:
            status = group.get_latest_poll_status()
            if status is not None and status.errors:
                _kill_silent(group, status)
            self._shutdown_worker_group()
        self._policy.held = {}

    def _save_before(self, num_workers: int) -> None:
        """Let the workers save and end, so that the change of the world costs no step."""
        group = self.get_worker_group()
        assert group is not None
        before = len(group.get_workers())
        self._events.add("resize", f"from {before} to {num_workers} workers", workers=num_workers)
        self._ask(Request.RESTART)
        deadline = time.monotonic() + self._settings.parallel.timeout_seconds
        status = group.poll_status(timeout=1.0)
        while time.monotonic() < deadline and not status.finished and not status.errors:
            time.sleep(0.05)
            status = group.poll_status(timeout=1.0)
        if not status.finished or status.errors:
            _logger.warning("the workers could not save before the world changes")

    def _ask(self, request: Request) -> None:
        group = self.get_worker_group()
        if group is not None:
            group.execute_async(ask, request)


def _kill_silent(group: Any, status: Any) -> None:
    """End workers of a failed group that have not failed themselves: one that hangs would hold its resources."""
    silent = [
        worker.metadata
        for rank, worker in enumerate(group.get_workers())
        if not isinstance(status.errors.get(rank), Exception)
        or isinstance(status.errors[rank], WorkerHealthCheckTimeoutError)
    ]
    kills = [
        ray.remote(num_cpus=0, max_retries=0)(_kill_worker)
        .options(scheduling_strategy=NodeAffinitySchedulingStrategy(metadata.node_id, soft=False))
        .remote(metadata.pid)
        for metadata in silent
    ]
    if kills:
        ray.wait(kills, num_returns=len(kills), timeout=_KILL_SECONDS)


def _kill_worker(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        # The id may be another process's by now.
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()


def _one_line(error: BaseException) -> str:
    if isinstance(error, WorkerHealthCheckFailedError):
        return "its process or node died"
    text = error.problem if isinstance(error, MoeRayError) else str(error)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:300]
