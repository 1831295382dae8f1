"""For how many workers the autoscaler is asked to have nodes.

Ray's autoscaler compares a request with whole nodes, busy or not, and takes it as a whole: where the limits of
the cluster keep it from all, it starts no node at all (`_enforce_resource_constraints` in Ray 2.60). So what
replicas hold is asked for on top, and what is infeasible is halved until it is not.
"""

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # ty: ignore

from moe_ray.config import ParallelConfig
from moe_ray.training.cluster_view import count_whole
from moe_ray.training.serving_demand import ServingDemand

_LOOK_SECONDS = 1.0


class NodeRequest:
    """The number of workers to ask for.

    Attributes:
        number: asked for now.
    """

    def __init__(self, parallel: ParallelConfig, per_worker: Mapping[str, float]) -> None:
        self.number = parallel.max_workers
        self._parallel = parallel
        self._per_worker = per_worker
        self._steps = Steps()
        self._looked_at = float("-inf")

    def refresh(self, serving: ServingDemand, held: Mapping[str, int]) -> bool:
        """Look at the cluster, once a second; returns whether the number has changed.

        While replicas wait, new nodes are for them: no more is asked for than there is.

        Args:
            serving: of endpoints on the cluster.
            held: running workers by node id.
        """
        now, before = time.monotonic(), self.number
        if now - self._looked_at < _LOOK_SECONDS:
            return False
        self._looked_at = now
        if serving.waiting:
            self.number = max(sum(held.values()), 1)
        else:
            existing, lost = count_whole(self._per_worker, serving.held)
            wanted, least = self._parallel.max_workers + lost, self._parallel.min_workers + lost
            is_infeasible = self.number > existing and _is_infeasible()
            self.number = self._steps.next(wanted, max(existing, least), is_infeasible, now)
        return self.number != before


class Steps:
    """A number that is halved towards a floor while it is infeasible."""

    # The autoscaler answers some 5 s later.
    ANSWER_SECONDS = 12.0
    # Limits may have changed, or others' nodes may have gone.
    RETRY_SECONDS = 120.0

    def __init__(self) -> None:
        self._number = 0
        self._aim = (0, 0)
        self._begun_at = self._changed_at = float("-inf")

    def next(self, wanted: int, floor: int, is_infeasible: bool, now: float) -> int:
        """The number to ask for.

        Args:
            wanted: the number in the end.
            floor: one that is not made smaller.
            is_infeasible: whether what was last asked for is.
            now: monotonic time, seconds.
        """
        if (wanted, floor) != self._aim or now - self._begun_at >= self.RETRY_SECONDS:
            self._aim, self._begun_at = (wanted, floor), now
            self._number, self._changed_at = wanted, now
        elif is_infeasible and now - self._changed_at >= self.ANSWER_SECONDS and self._number > floor:
            self._number, self._changed_at = floor + (self._number - floor) // 2, now
        return self._number


def _is_infeasible() -> bool:
    """Whether limits keep the autoscaler from what it was asked for; False without an autoscaler."""
    gcs: Any = ray._private.worker.global_worker.gcs_client  # ty: ignore
    state = GetClusterStatusReply.FromString(gcs.get_cluster_status(timeout_s=5)).autoscaling_state
    return bool(state.infeasible_cluster_resource_constraints)
