"""Ray Train's controller with our answers to its two questions: how many workers, and whether to try again.

Ray Train's own elastic policy counts all resources, busy or not, lags behind the loss of a node, and restarts a
growing group from the last checkpoint. Ours counts what is free on nodes that answer, and asks the workers for a
checkpoint before it changes the world.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ReportCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from moe_ray.config import Config, build_config
from moe_ray.errors import MoeRayError, RestartRequested, StorageError
from moe_ray.storage import open_storage
from moe_ray.telemetry.logs import setup_logging
from moe_ray.telemetry.run_log import EVENTS, RunLog
from moe_ray.training.cluster_view import count_slots, draining_nodes
from moe_ray.training.failures import our_error, root_causes
from moe_ray.training.requests import Request, ask

_logger = logging.getLogger(__name__)
_SETTLE_SECONDS = 2.0
_WAITING_LOG_SECONDS = 30.0


class Events:
    """What happened to the workers of a run, as lines of its events.jsonl and of the log."""

    def __init__(self, config: Config) -> None:
        self._log = RunLog(open_storage(config.train.run_uri, config.checkpoint.retry_seconds), EVENTS)

    def add(self, event: str, text: str, **details: Any) -> None:
        """Note an event.

        Args:
            event: its kind.
            text: the same for people.
            details: numbers and names.
        """
        _logger.info("%s", text)
        self._log.append({"event": event, "time": time.time(), **details})


class WorldPolicy(ElasticScalingPolicy):
    """As many workers as fit on free resources of nodes that stay, between `min` and `max`."""

    def __init__(self, scaling_config: Any, config: Config, events: Events) -> None:
        super().__init__(scaling_config)
        self.held: Mapping[str, int] = {}
        self._parallel = config.parallel
        self._events = events
        self._per_worker = scaling_config._resources_per_worker_not_none
        self._seen = (-1, 0.0)
        self._told_at = float("-inf")
        self._doomed: frozenset[str] = frozenset()

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start as soon as the count has settled: resources of the dead come back one by one."""
        self._maybe_send_resource_request()
        count, now = self._count(probe=True), time.monotonic()
        if count != self._seen[0]:
            self._seen = (count, now)
        settled = count == self._parallel.max_workers or now - self._seen[1] >= _SETTLE_SECONDS
        if count >= self._parallel.min_workers and settled:
            return self._resize(count)
        if count < self._parallel.min_workers and now - self._told_at > _WAITING_LOG_SECONDS:
            self._told_at = now
            self._events.add(
                "waiting",
                f"waiting for room for {self._parallel.min_workers} workers; there is room for {count}",
                room=count,
            )
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Shrink at once if a node of ours is to leave, grow after `parallel.grow_after_seconds`."""
        self._maybe_send_resource_request()
        current, now = worker_group_state.num_workers, time.monotonic()
        doomed = draining_nodes() & self.held.keys()
        if doomed - self._doomed:
            self._doomed = doomed
            self._events.add("drain", f"{len(doomed)} nodes of this run are to leave", nodes=len(doomed))
            return self._resize(max(self._count(), 1))
        started = max(worker_group_state.start_time, self._latest_monitor_time)
        if current >= self._parallel.max_workers or now - started < self._parallel.grow_after_seconds:
            return NoopDecision()
        self._latest_monitor_time = now
        count = self._count()
        return self._resize(count) if count > current else NoopDecision()

    def _count(self, probe: bool = False) -> int:
        return min(count_slots(self._per_worker, self.held, probe=probe), self._parallel.max_workers)

    def _resize(self, count: int) -> ResizeDecision:
        return ResizeDecision(num_workers=count, resources_per_worker=self._per_worker)


class RetryPolicy(FailurePolicy, ReportCallback):
    """Try again whatever may pass by itself; give up on what the user must mend, and on what never gets on."""

    def __init__(self, failure_config: Any, config: Config, events: Events) -> None:
        super().__init__(failure_config)
        self._limit = config.parallel.max_failures
        self._events = events
        self._failures = 0
        self._newest_step = self._step_at_failure = 0

    def after_report(self, training_report: Any, metrics: list[dict[str, Any]]) -> None:
        """Remember how far the run has come."""
        self._newest_step = max(self._newest_step, int(metrics[0].get("step", 0)))

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether the workers are started again."""
        if isinstance(training_failed_error, ControllerError) and isinstance(
            training_failed_error.controller_failure, WorkerGroupStartupTimeoutError
        ):
            return FailureDecision.RETRY  # nodes left meanwhile: the next count knows
        causes = root_causes(training_failed_error)
        error = our_error(causes)
        if isinstance(error, RestartRequested):
            self._events.add("restart", error.problem)
            return FailureDecision.RETRY
        self._failures = self._failures + 1 if self._newest_step <= self._step_at_failure else 1
        self._step_at_failure = self._newest_step
        may_pass = error is None or isinstance(error, StorageError)
        retry = may_pass and self._failures <= self._limit
        ranks = (
            sorted(training_failed_error.worker_failures)
            if isinstance(training_failed_error, WorkerGroupError)
            else []
        )
        reason = _one_line(error or (causes[0] if causes else training_failed_error))
        self._events.add(
            "failure",
            f"workers {ranks} failed ({reason}); {'starting again' if retry else 'giving up'}",
            reason=reason,
            ranks=ranks,
            retry=retry,
            step=self._newest_step,
        )
        return FailureDecision.RETRY if retry else FailureDecision.RAISE


class ElasticController(TrainController):
    """Runs on the driver's node as an actor, for as long as the driver lives."""

    def __init__(
        self, *, settings: dict[str, Any], train_run_context: Any, callbacks: list[Any], **rest: Any
    ) -> None:
        config = build_config(settings)
        setup_logging(config.telemetry.log_level)
        self._settings = config
        self._events = Events(config)
        self._policy = WorldPolicy(train_run_context.scaling_config, config, self._events)
        retry = RetryPolicy(train_run_context.run_config.failure_config, config, self._events)
        rest |= {"scaling_policy": self._policy, "failure_policy": retry}
        super().__init__(train_run_context=train_run_context, callbacks=[*callbacks, retry], **rest)

    async def stop(self) -> None:
        """Ask the workers to save and end."""
        group = self.get_worker_group()
        if group is None:
            raise RuntimeError("no worker runs")
        await asyncio.gather(*group.execute_async(ask, Request.STOP))

    def _execute_resize_decision(self, decision: ResizeDecision) -> Any:
        group = self.get_worker_group()
        if group is not None and not (group.get_latest_poll_status() or _NO_STATUS).errors:
            self._save_before(decision.num_workers)
        self._policy.held = {}
        return super()._execute_resize_decision(decision)

    def _start_worker_group(self, num_workers: int, resources_per_worker: dict) -> None:
        super()._start_worker_group(num_workers, resources_per_worker)
        group = self.get_worker_group()
        assert group is not None
        self._policy.held = Counter(worker.metadata.node_id for worker in group.get_workers())
        self._events.add("start", f"{num_workers} workers train", workers=num_workers)

    def _save_before(self, num_workers: int) -> None:
        """Let the workers save and end, so that the change of the world costs no step."""
        group = self.get_worker_group()
        assert group is not None
        before = len(group.get_workers())
        self._events.add("resize", f"from {before} to {num_workers} workers", workers=num_workers)
        try:
            ray.get(group.execute_async(ask, Request.RESTART), timeout=self._settings.parallel.timeout_seconds)
            deadline = time.monotonic() + self._settings.parallel.timeout_seconds
            while time.monotonic() < deadline and not group.poll_status(timeout=1.0).finished:
                time.sleep(0.05)
        except RayError as error:
            _logger.warning("the workers could not save before the world changes: %s", error)


class _NoStatus:
    errors: Mapping[int, Exception] = {}


_NO_STATUS = _NoStatus()


def _one_line(error: BaseException) -> str:
    text = error.problem if isinstance(error, MoeRayError) else str(error)
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"[:300]
