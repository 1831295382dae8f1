"""How many workers the cluster has room for now, from a fresh look at each of its nodes."""

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

_PROBE_SECONDS = 1.0


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are about to leave the cluster."""
    return frozenset(ray._private.state.state.get_draining_nodes())  # ty: ignore


def count_slots(per_worker: Mapping[str, float], held: Mapping[str, int], *, probe: bool = False) -> int:
    """Workers that fit on the free resources of the nodes that are alive and stay.

    Args:
        per_worker: resources of one worker.
        held: workers by node id whose resources count as free, because they are ours.
        probe: also connect to each node: the cluster's own view lags behind a loss by many seconds.
    """
    leaving = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]
    if probe and nodes:
        with ThreadPoolExecutor(min(32, len(nodes))) as pool:
            nodes = [node for node, answers in zip(nodes, pool.map(_answers, nodes), strict=True) if answers]
    available = ray._private.state.available_resources_per_node()  # ty: ignore
    return sum(
        held.get(node["NodeID"], 0) + _fitting(available.get(node["NodeID"], {}), per_worker) for node in nodes
    )


def _fitting(free: Mapping[str, float], per_worker: Mapping[str, float]) -> int:
    # Ray counts in ten-thousandths; sums of fractions must not lose a worker to rounding.
    return min(
        (int((free.get(name, 0.0) + 1e-6) / amount) for name, amount in per_worker.items() if amount > 0),
        default=0,
    )


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _PROBE_SECONDS):
            return True
    except OSError:
        return False
