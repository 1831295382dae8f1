"""Nodes and replicas of a Ray cluster, told by a process of its own to the one that asks."""

import json
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import ray
import ray.exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo  # ty: ignore
from ray.serve.context import _get_global_client
from ray.serve.schema import DeploymentDetails, ServeInstanceDetails

from moe_ray.telemetry.samples import Sample

_REPLICA = "ServeReplica:"
_UNEXPECTED = NodeDeathInfo.Reason.Value("UNEXPECTED_TERMINATION")
# Serve ends replicas by other means.
_DIED = {ActorDiedErrorContext.Reason.Value(name) for name in ("WORKER_DIED", "NODE_DIED")}


def answer(pipe: Connection) -> None:
    """Answer each message with JSON: `samples` and the addresses of the metrics `agents`, or an `error`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    state = None
    try:
        while True:
            pipe.recv_bytes()
            try:
                state = state or ClusterState()
                reply: dict[str, Any] = {"samples": state.samples(), "agents": agents()}
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                reply = {"error": str(error).partition("\n")[0] or type(error).__name__}
            pipe.send_bytes(json.dumps(reply).encode())
    except (EOFError, OSError):
        # Nobody asks any more; an orderly end would wait for a cluster that may be gone.
        os._exit(0)


class ClusterState:
    """The cluster that RAY_ADDRESS names, joined as a driver that needs nothing; earlier deaths are known."""

    def __init__(self) -> None:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
            # Ray's own prints a stack when the monitor is stopped.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._lost_before = len(_lost_nodes())
        self._died_before = _dead_replicas()

    def samples(self) -> list[Sample]:
        """Nodes, and replicas by state."""
        alive = sum(node["Alive"] for node in ray.nodes())
        lost = len(_lost_nodes()) - self._lost_before
        return [
            Sample("moe_cluster_nodes", {}, alive),
            Sample("moe_cluster_nodes_lost", {}, lost),
            *self._replica_samples(),
        ]

    def _replica_samples(self) -> Iterator[Sample]:
        died = _dead_replicas()
        for app, deployments in _applications().items():
            states: Counter[str] = Counter({"RUNNING": 0})
            wanted = 0
            for deployment in deployments:
                states.update(replica.state.value for replica in deployment.replicas)
                wanted += deployment.target_num_replicas or 0
            yield Sample("moe_cluster_replicas_wanted", {"app": app}, wanted)
            yield Sample("moe_cluster_replicas_lost", {"app": app}, died[app] - self._died_before[app])
            for state, count in states.items():
                yield Sample("moe_cluster_replicas", {"app": app, "state": state}, count)


def agents() -> list[str]:
    """Addresses of the metrics agents of the nodes."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]


def _applications() -> dict[str, list[DeploymentDetails]]:
    # `serve.status()` leaves out how many replicas are wanted.
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    details = ServeInstanceDetails(**client.get_serve_details())
    return {name: list(app.deployments.values()) for name, app in details.applications.items()}


def _lost_nodes() -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["DeathReason"] == _UNEXPECTED]


def _dead_replicas() -> Counter[str]:
    """By application, how many replicas have ever died by themselves or with their node."""
    actors = ray._private.state.state.actor_table(None, actor_state_name="DEAD")  # ty: ignore
    return Counter(
        actor["ActorClassName"].split(":")[1]
        for actor in actors.values()
        if actor["ActorClassName"].startswith(_REPLICA) and _has_died(actor["DeathCause"])
    )


def _has_died(cause: Any) -> bool:
    return cause.HasField("oom_context") or cause.actor_died_error_context.reason in _DIED
