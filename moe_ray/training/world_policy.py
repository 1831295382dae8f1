"""How many workers train: our answer to the first question of Ray Train's controller.

Ray Train's own elastic policy counts all resources, busy or not, lags behind the loss of a node, and restarts a
growing group from the last checkpoint. Ours counts what is free on nodes that answer, less what replicas of
endpoints wait for.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)

from moe_ray.config import Config
from moe_ray.errors import TrainingError
from moe_ray.parallel.plan import best_world
from moe_ray.training.cluster_view import count_slots, draining_nodes
from moe_ray.training.events import Events
from moe_ray.training.node_request import NodeRequest
from moe_ray.training.serving_demand import ServingWatch

_SETTLE_SECONDS = 2.0
_WAITING_LOG_SECONDS = 30.0


class WorldPolicy(ElasticScalingPolicy):
    """As many workers as fit on free resources of nodes that stay, between `min` and `max`.

    Args:
        save_only: asks the workers to save and go on.
        release: gives up what is left of workers that have failed.
    """

    def __init__(
        self,
        scaling_config: Any,
        config: Config,
        events: Events,
        save_only: Callable[[], None],
        release: Callable[[], None],
    ) -> None:
        super().__init__(scaling_config)
        self.save_only = save_only
        self.release = release
        self.held: Mapping[str, int] = {}
        self._config = config
        self._parallel = config.parallel
        self._events = events
        self._per_worker = scaling_config._resources_per_worker_not_none
        self._seen = (-1, 0.0)
        self._told_at = float("-inf")
        self._doomed: frozenset[str] = frozenset()
        self._not_before = self._yielded_at = float("-inf")
        self._serving = ServingWatch(config.parallel)
        self._request = NodeRequest(config.parallel, self._per_worker)
        self.is_stopping = False

    def delay(self, seconds: float) -> None:
        """Start no workers for a while."""
        self._not_before = time.monotonic() + seconds

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start as soon as the count has settled: resources of the dead come back one by one.

        Raises:
            TrainingError: the run was asked to end.
        """
        if self.is_stopping:
            raise TrainingError(
                "a signal ended the run while no worker trained.", "run the same command to go on."
            )
        self._maybe_send_resource_request()
        if time.monotonic() < self._not_before:
            return NoopDecision()
        count, now = self._count(probe=True), time.monotonic()
        if count != self._seen[0]:
            self._seen = (count, now)
        settled = count == self._parallel.max_workers or now - self._seen[1] >= _SETTLE_SECONDS
        if count >= self._parallel.min_workers and settled:
            return self._resize(count)
        if count < self._parallel.min_workers and self.held:
            # Ray moves their places to any node that comes, where nobody would use them.
            self.release()
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
        if worker_group_status.finished:
            self._events.add("restart", "the workers have saved and make way for another world")
            return self._resize(max(self._count(), self._parallel.min_workers))
        doomed = draining_nodes() & self.held.keys()
        if doomed - self._doomed:
            self._doomed = doomed
            count = self._count()
            self._events.add(
                "drain", f"{len(doomed)} nodes of this run are to leave", nodes=len(doomed), room=count
            )
            if count >= self._parallel.min_workers:
                return self._resize(count)
            self.save_only()
            return NoopDecision()
        if self._serving.has_waited:
            count = max(self._count(), self._parallel.min_workers)
            if count < current:
                self._yielded_at = now
                waiting = len(self._serving.look().waiting)
                self._events.add("yield", f"{waiting} replicas wait for room of this run", replicas=waiting)
                return self._resize(count)
        if now - self._yielded_at < self._parallel.return_after_seconds:
            return NoopDecision()
        started = max(worker_group_state.start_time, self._latest_monitor_time)
        if current >= self._parallel.max_workers or now - started < self._parallel.grow_after_seconds:
            return NoopDecision()
        self._latest_monitor_time = now
        count = self._count()
        return self._resize(count) if count > current else NoopDecision()

    def _count(self, probe: bool = False) -> int:
        claims = self._serving.look().waiting
        slots = count_slots(self._per_worker, self.held, claims=claims, probe=probe)
        room = min(slots, self._parallel.max_workers)
        if room < self._parallel.min_workers or self._parallel.memory_gib is None:
            return room
        return best_world(self._config, room, int(self._parallel.memory_gib * 2**30))

    def _maybe_send_resource_request(self) -> None:
        if self._request.refresh(self._serving.look(), self.held):
            self._send_resource_request()
        super()._maybe_send_resource_request()

    def _get_num_workers_for_resource_request(self) -> int:
        return self._request.number

    def _resize(self, count: int) -> ResizeDecision:
        return ResizeDecision(num_workers=count, resources_per_worker=self._per_worker)
