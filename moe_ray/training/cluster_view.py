"""How many workers the cluster has room for now, from a fresh look at each of its nodes."""

import socket
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

_PROBE_SECONDS = 1.0
Resources = Mapping[str, float]


def draining_nodes() -> frozenset[str]:
    """Ids of the nodes that are about to leave the cluster."""
    return frozenset(ray._private.state.state.get_draining_nodes())  # ty: ignore


def count_slots(
    per_worker: Resources, held: Mapping[str, int], *, claims: Iterable[Resources] = (), probe: bool = False
) -> int:
    """Workers that fit on the free resources of the nodes that are alive and stay.

    Args:
        per_worker: resources of one worker.
        held: workers by node id whose resources count as free, because they are ours.
        claims: resources that others take first, as in `fit`.
        probe: also connect to each node: the cluster's own view lags behind a loss by many seconds.
    """
    nodes = _staying_nodes()
    if probe and nodes:
        with ThreadPoolExecutor(min(32, len(nodes))) as pool:
            nodes = [node for node, answers in zip(nodes, pool.map(_answers, nodes), strict=True) if answers]
    available = ray._private.state.available_resources_per_node()  # ty: ignore
    free = [_plus(available.get(node["NodeID"], {}), per_worker, held.get(node["NodeID"], 0)) for node in nodes]
    return fit(free, per_worker, claims)


def fit(free: Iterable[Resources], per_worker: Resources, claims: Iterable[Resources] = ()) -> int:
    """Workers that fit on nodes.

    Args:
        free: resources of each node.
        per_worker: resources of one worker.
        claims: resources that others take first, each on the node where it costs the fewest workers, if it has
            room anywhere.
    """
    rooms = [dict(room) for room in free]
    for claim in claims:
        _take(rooms, claim, per_worker)
    return sum(_fitting(room, per_worker) for room in rooms)


def count_whole(per_worker: Resources, taken: Mapping[str, Resources]) -> tuple[int, int]:
    """Workers that would fit on the nodes that are alive and stay, were they free, and how many fewer do.

    Args:
        per_worker: resources of one worker.
        taken: by node id, resources that others hold.
    """
    whole = lost = 0
    for node in _staying_nodes():
        fitting = _fitting(node["Resources"], per_worker)
        whole += fitting
        lost += fitting - _fitting(_plus(node["Resources"], taken.get(node["NodeID"], {}), -1), per_worker)
    return whole, lost


def _staying_nodes() -> list[dict[str, Any]]:
    leaving = draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def _take(free: list[dict[str, float]], claim: Resources, per_worker: Resources) -> None:
    costs: list[tuple[int, int, dict[str, float]]] = []
    for number, room in enumerate(free):
        if _fitting(room, claim):
            left = _plus(room, claim, -1)
            costs.append((_fitting(room, per_worker) - _fitting(left, per_worker), number, left))
    if costs:
        _, number, left = min(costs, key=lambda cost: cost[:2])
        free[number] = left


def _plus(resources: Resources, more: Resources, times: int) -> dict[str, float]:
    names: Sequence[str] = [*resources, *(name for name in more if name not in resources)]
    return {name: resources.get(name, 0.0) + times * more.get(name, 0.0) for name in names}


def _fitting(free: Resources, per_worker: Resources) -> int:
    # Ray counts in ten-thousandths; sums of fractions must not lose a worker to rounding.
    return max(
        0,
        min(
            (int((free.get(name, 0.0) + 1e-6) / amount) for name, amount in per_worker.items() if amount > 0),
            default=0,
        ),
    )


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _PROBE_SECONDS):
            return True
    except OSError:
        return False
