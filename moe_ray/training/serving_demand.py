"""What replicas of endpoints on this cluster hold, and what those that found no place wait for."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated.gcs_pb2 import ActorTableData  # ty: ignore

from moe_ray.config import ParallelConfig

_REPLICA = "ServeReplica:"
_LOOK_SECONDS = 1.0
Resources = Mapping[str, float]


@dataclass(frozen=True)
class ServingDemand:
    """Resources of replicas.

    Attributes:
        held: by node id, what running replicas take together.
        waiting: of each replica that found no place.
    """

    held: Mapping[str, Resources]
    waiting: Sequence[Resources]


def serving_demand() -> ServingDemand:
    """Ask the cluster that this process belongs to."""
    held: dict[str, Counter[str]] = {}
    for replica in _replicas("ALIVE"):
        held.setdefault(replica.address.node_id.hex(), Counter()).update(dict(replica.required_resources))
    # A replica that has its place is pending too while it imports; the autoscaler's list has only those without.
    starting = Counter(_shape(replica.required_resources) for replica in _replicas("PENDING_CREATION"))
    waiting: list[Resources] = []
    for demand in get_cluster_resource_state(_gcs()).pending_resource_requests:
        shape = _shape(demand.request.resources_bundle)
        waiting += [dict(shape)] * min(starting[shape], demand.count)
    return ServingDemand(held, waiting)


def _replicas(state: str) -> Iterator[Any]:
    accessor = ray._private.state.state._connect_and_get_accessor()  # ty: ignore
    for serialized in accessor.get_actor_table(None, state):
        actor = ActorTableData.FromString(serialized)
        if actor.class_name.startswith(_REPLICA):
            yield actor


def _shape(resources: Resources) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, amount) for name, amount in resources.items() if amount > 0))


def _gcs() -> Any:
    return ray._private.worker.global_worker.gcs_client  # ty: ignore


class ServingWatch:
    """Looks at serving's demand once a second and remembers since when replicas wait.

    Args:
        parallel: with `yield_after_seconds=None` nobody looks, and serving seems to want nothing.
    """

    def __init__(self, parallel: ParallelConfig) -> None:
        self._parallel = parallel
        self._demand = ServingDemand({}, ())
        self._looked_at = float("-inf")
        self._waits_since: float | None = None

    def look(self) -> ServingDemand:
        """What replicas hold and wait for, about a second old at most."""
        now = time.monotonic()
        if self._parallel.yield_after_seconds is not None and now - self._looked_at >= _LOOK_SECONDS:
            self._demand, self._looked_at = serving_demand(), now
            if not self._demand.waiting:
                self._waits_since = None
            elif self._waits_since is None:
                self._waits_since = now
        return self._demand

    @property
    def has_waited(self) -> bool:
        """Whether replicas wait for so long that training makes way."""
        patience = self._parallel.yield_after_seconds
        since = self._waits_since
        return patience is not None and since is not None and time.monotonic() - since >= patience
