"""The workers and nodes of a run, and what can be done to them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.core.generated import autoscaler_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_TASK_SECONDS = 60.0
_OBJECT_STORE_BYTES = 100_000_000
_HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class Worker:
    """A training process."""

    pid: int
    node_id: str


def workers_of(driver_pid: int) -> list[Worker]:
    """The training workers of a driver, in a fixed order."""
    actors = _actors_of(driver_pid, "RayTrainWorker")
    return sorted((Worker(a["Pid"], a["Address"]["NodeID"]) for a in actors), key=lambda w: (w.node_id, w.pid))


def send_signal(workers: Sequence[Worker], number: int) -> float:
    """Send a signal to workers; returns when the first got it, in seconds since the epoch."""
    tasks = [_on(worker.node_id, _signal_worker).remote(worker.pid, number) for worker in workers]
    return min(ray.get(tasks, timeout=_TASK_SECONDS))


def spare_nodes(driver_pid: int, workers: Sequence[Worker], min_workers: int) -> list[str]:
    """Nodes with workers that can go: neither the head's nor the driver's, and enough workers are elsewhere."""
    kept = {ray.get_runtime_context().get_node_id()}
    kept |= {node["NodeID"] for node in ray.nodes() if _HEAD in node["Resources"]}
    kept |= {actor["Address"]["NodeID"] for actor in _actors_of(driver_pid, "ElasticController")}
    return [
        node_id
        for node_id in sorted({worker.node_id for worker in workers} - kept)
        if sum(worker.node_id != node_id for worker in workers) >= min_workers
    ]


def lose(node_id: str, in_seconds: float = 2.0) -> float:
    """Kill a node's raylet in a while; returns when, in seconds since the epoch."""
    then = time.time() + in_seconds
    _on(node_id, _end_raylet).remote(then)
    return then


def drain(node_id: str, seconds: int) -> float:
    """Announce that a node goes in so many seconds, then kill it; returns when that was announced.

    Raises:
        RuntimeError: the cluster refused.
    """
    # A draining node takes no tasks.
    lose(node_id, seconds)
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)  # ty: ignore
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")  # ty: ignore
    announced = time.time()
    accepted, message = client.drain_node(node_id, reason, "chaos", int((announced + seconds) * 1000))
    if not accepted:
        raise RuntimeError(message)
    return announced


def is_on_one_machine() -> bool:
    """Whether all nodes have this node's address."""
    return {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]} == {own_address()}


def own_address() -> str:
    """IP address of this process's node."""
    return ray.util.get_node_ip_address()


def start_node(num_cpus: int, log_file: Path) -> subprocess.Popen[bytes]:
    """Start another node on this machine; `end_node` ends it."""
    options = {
        "address": ray.get_runtime_context().gcs_address,
        "node-ip-address": own_address(),
        "num-cpus": num_cpus,
        "object-store-memory": _OBJECT_STORE_BYTES,
        # Those of the first node on this machine are taken; 0 lets Ray choose.
        "dashboard-agent-listen-port": 0,
        "dashboard-agent-grpc-port": 0,
        "metrics-export-port": 0,
        "runtime-env-agent-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
    with log_file.open("ab") as log:
        return subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in options.items())],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that was started in a session of its own, with all that it started."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()


def _actors_of(driver_pid: int, class_name: str) -> list[dict[str, Any]]:
    state = ray._private.state  # ty: ignore
    jobs = {job["JobID"] for job in state.jobs() if job["DriverPid"] == driver_pid}
    actors = state.actors(actor_state_name="ALIVE").values()
    return [actor for actor in actors if actor["JobID"] in jobs and class_name in actor["ActorClassName"]]


def _on(node_id: str, function: Any) -> Any:
    affinity = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=affinity)


def _signal_worker(pid: int, number: int) -> float:
    process = psutil.Process(pid)
    # The id may be another process's by now.
    if "RayTrainWorker" not in " ".join(process.cmdline()):
        raise ProcessLookupError(pid)
    now = time.time()
    process.send_signal(number)
    return now


def _end_raylet(then: float) -> None:
    time.sleep(max(0.0, then - time.time()))
    parent = psutil.Process(os.getppid())
    if parent.name() == "raylet":
        parent.send_signal(signal.SIGKILL)
