"""A real Ray cluster of several nodes on this machine, and a training job that runs on it."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml
from ray.cluster_utils import Cluster

from moe_ray.telemetry.run_log import read_metrics

# So that the loss of a node is seen in seconds; it is how a cluster with spot nodes would be set up.
QUICK_TO_NOTICE = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
}
_OBJECT_STORE_BYTES = 100_000_000


class Nodes:
    """A head without CPUs, and nodes of one CPU that come and go."""

    def __init__(self, count: int) -> None:
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": _OBJECT_STORE_BYTES}
        )
        self.nodes: list[Any] = []
        self.resize(count)

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=_OBJECT_STORE_BYTES))

    def lose(self) -> None:
        """SIGKILL all processes of the newest node."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)

    def drain(self, seconds: int = 30) -> None:
        """Give notice that the newest node will go; `lose` it afterwards."""
        command = [Path(sys.executable).parent / "ray", "drain-node", "--address", self.cluster.address]
        command += ["--node-id", self.nodes[-1].node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "test", "--deadline-remaining-seconds", str(seconds)]
        subprocess.run([str(part) for part in command], check=True, capture_output=True)

    def resize(self, count: int) -> None:
        while len(self.nodes) < count:
            self.add()
        while len(self.nodes) > count:
            self.lose()


@contextmanager
def start_nodes(count: int) -> Iterator[Nodes]:
    """A cluster with `count` nodes beside the head."""
    # Unix sockets live in it, whose paths hold at most 107 characters.
    temp_dir = tempfile.mkdtemp(prefix="mr-", dir="/tmp")
    before = dict(os.environ)
    # Not the head's `temp_dir`: Ray's Cluster would still write its address to the default, which may not exist.
    os.environ.update(QUICK_TO_NOTICE, RAY_TMPDIR=temp_dir)
    nodes = None
    try:
        nodes = Nodes(count)
        yield nodes
    finally:
        if nodes is not None:
            nodes.cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(temp_dir, ignore_errors=True)


class ElasticJob:
    """`jobs/train.py` as a subprocess on the cluster."""

    def __init__(self, nodes: Nodes, settings: dict[str, Any]) -> None:
        self.run_dir = Path(settings["train"]["storage"]) / settings["train"]["name"]
        self.run_dir.mkdir(parents=True)
        config = self.run_dir.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(settings))
        self._output = self.run_dir.with_suffix(".log")
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "jobs/train.py", str(config)],
                env=os.environ | {"RAY_ADDRESS": nodes.cluster.address},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> "ElasticJob":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def last(self) -> dict[str, Any]:
        """The metrics logged last; {} if there are none yet."""
        metrics = read_metrics(self.run_dir)
        return metrics[-1] if metrics else {}

    def wait_until(self, is_so: Callable[[dict[str, Any]], bool], seconds: float = 90.0) -> dict[str, Any]:
        """The first newest metrics of which `is_so` is true."""
        deadline = time.monotonic() + seconds
        while True:
            last = self.last()
            if last and is_so(last):
                return last
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, f"{last}\n{self.output}"
            time.sleep(0.05)

    def resumed_after(self, disturb: Callable[[], object], world_size: int | None = None) -> dict[str, Any]:
        """Do something, and wait until the workers have started anew."""
        before = _start_of(self.last())
        disturb()
        return self.wait_until(lambda m: _start_of(m) != before and world_size in (None, m["world_size"]))

    def finish(self) -> list[dict[str, Any]]:
        """Wait for the end; the metrics of all steps."""
        assert self.process.wait(timeout=200) == 0, self.output
        metrics = read_metrics(self.run_dir)
        assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
        return metrics


def _start_of(metrics: dict[str, Any]) -> tuple[int, int]:
    """What tells one start of the workers from the next."""
    return metrics["resumed_step"], metrics["redone_steps"]


def train_workers() -> list[psutil.Process]:
    """Ray Train workers among this process's descendants."""
    found = []
    for child in psutil.Process().children(recursive=True):
        # One may end while it is looked at.
        with suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(child.cmdline()[:1]):
                found.append(child)
    return found


def signal_worker(number: signal.Signals) -> psutil.Process:
    """Send a signal to one of the workers."""
    victim = train_workers()[-1]
    victim.send_signal(number)
    return victim
