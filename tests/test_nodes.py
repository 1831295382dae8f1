"""Local clusters whose nodes Ray's autoscaler starts and ends, and the page that says how to use them."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.local import ClusterError, LocalCluster
from cluster.nodes import LocalNode, NodePlan, running_nodes
from cluster.preempt import drain
from cluster.processes import find_marked
from moe_ray.errors import ConfigError
from moe_ray.telemetry.run_log import read_metrics
from tests.tiny import copy_corpus, tiny_settings
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "autoscaling.md").read_text(encoding="utf-8")
PATIENCE = 240
# Needs a spot node until its input ends, and another one if that is lost.
DRIVER = """
import sys, time, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1, resources={"spot": 1}, max_restarts=-1, max_task_retries=-1)
class Work:
    def node(self):
        return ray.get_runtime_context().get_node_id()
work = Work.remote()
print(first := ray.get(work.node.remote()), flush=True)
while (now := ray.get(work.node.remote())) == first:
    time.sleep(0.1)
print(now, flush=True)
sys.stdin.read()
"""


def page_commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    cluster = LocalCluster(tmp_path / "cluster")
    try:
        yield cluster
    finally:
        cluster.stop()


def run(cluster: LocalCluster, command: str, *options: str) -> str:
    """Run a command line of the page on a cluster; returns what it prints."""
    words = [sys.executable, *shlex.split(command)[1:], *options, "--dir", str(cluster.token_file.parent)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_nodes_come_with_the_work_and_go_without_it(cluster: LocalCluster) -> None:
    start, status, lose, notice, stop = [line for line in page_commands() if line.startswith("python -m cluster.")]
    small = ["--nodes", "1,1", "--spot-nodes", "0,1", "--max-nodes", "2", "--cpus-per-node", "1"]
    run(cluster, start, *small, "--idle-seconds", "5")
    head = cluster.head()
    assert head is not None
    temp_dir = head.temp_dir

    def groups() -> list[str]:
        return sorted(node.group for node in running_nodes(temp_dir))

    until(lambda: groups() == ["cpu"], PATIENCE)
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        env=os.environ | cluster.environment(head),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        try:
            first = _next_node(driver)
            (spot,) = (node for node in running_nodes(temp_dir) if node.group == "spot")
            assert first == spot.node_id
            _check_loopback(temp_dir)
            assert re.search(r"spot +1 active", run(cluster, status))
            run(cluster, notice, "--notice", "2")
            assert not any(process.is_running() for process in spot.processes)
            assert _next_node(driver) != first
            assert groups() == ["cpu", "spot"]
        finally:
            driver.communicate()
    until(lambda: groups() == ["cpu"], PATIENCE)
    assert "of the group 'spot' runs" in _refused(cluster, lose)
    assert run(cluster, stop) == "stopped\n"
    assert find_marked(temp_dir) == []
    assert not Path(temp_dir).exists()


def _next_node(driver: subprocess.Popen[str]) -> str:
    """What the driver prints next; Ray writes to its output too."""
    assert driver.stdout is not None
    return next(line.strip() for line in driver.stdout if re.fullmatch(r"[0-9a-f]{56}\n", line))


def _check_loopback(temp_dir: str) -> None:
    addresses = {
        connection.laddr.ip
        for process in find_marked(temp_dir)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}


def _refused(cluster: LocalCluster, command: str) -> str:
    words = [sys.executable, *shlex.split(command)[1:], "--dir", str(cluster.token_file.parent)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cpu": (2, 1)}, "--nodes 2,1 is no range"),
        ({"cpu": (0, 0)}, "--nodes 0,0 leaves no node"),
        ({"idle_seconds": float("nan")}, "--idle-seconds nan must be positive"),
        ({"spot": (-1, 1)}, "--spot-nodes -1,1 is no range"),
        ({"cpu": (3, 4), "spot": (2, 2), "most": 4}, "--max-nodes 4 is fewer than the least of both"),
        ({"most": 0}, "--max-nodes 0 is fewer"),
        ({"cpus_per_node": 0}, "--cpus-per-node 0 is no number of CPUs"),
        ({"cpus_per_node": 10**12}, "--cpus-per-node 1000000000000 is no number of CPUs. Fix: use 1 to 1024."),
        ({"idle_seconds": 0.0}, "--idle-seconds 0"),
    ],
)
def test_wrong_numbers_of_nodes_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        NodePlan(**options)


def test_without_a_limit_there_are_as_many_nodes_as_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "autoscaling.json"
    for most, limit in ((None, 11), (5, 5)):
        plan = NodePlan(cpu=(1, 8), spot=(0, 3), most=most)
        plan.write(file, "127.0.0.1:1")
        assert json.loads(file.read_text())["max_workers"] == limit
        assert f"at most {limit}" in str(plan)


def test_a_notice_that_the_cluster_does_not_take_is_one_line() -> None:
    with pytest.raises(ClusterError, match=r"the notice for node nsuch, which stays: .*Invalid hex ID") as error:
        drain(LocalNode("nonsuch", "spot", ()), {"RAY_ADDRESS": "127.0.0.1:1"}, 2)
    assert "\n" not in str(error.value)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_replicas_nodes_and_training_share_a_cluster_and_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/nodes.py", "--replicas", "8", "--clients", "40", "--workers", "3"]
    command += ["--cpus-per-node", "3", "--idle-seconds", "5", "--out", str(tmp_path / "nodes.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "nodes.json").read_text())
    assert found["requests"] > 100
    assert found["failures"] == {}
    looks = found["looks"]
    assert max(look["running"] for look in looks) == 8
    assert (max(look["nodes"] for look in looks), looks[-1]["running"]) == (3, 2)
    training = found["training"]
    assert (training["lost"], training["repeated"]) == (0, 0)
    assert training["loss_difference"] < 1e-4
    assert {1, 3} <= set(training["worlds"])
    kinds = [event["event"] for event in found["events"]]
    # Made way for replicas, was hit by the loss of its node, and grew again.
    assert kinds.index("yield") < kinds.index("failure") < len(kinds) - 1 - kinds[::-1].index("start")


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_a_run_gets_the_nodes_that_limits_allow(cluster: LocalCluster, tmp_path: Path) -> None:
    """Ray's autoscaler starts none for a request that it cannot fulfil as a whole."""
    head = cluster.start(nodes=NodePlan(cpu=(0, 0), spot=(0, 2), most=2, cpus_per_node=1))
    (tmp_path / "corpus").mkdir()
    settings = tiny_settings(copy_corpus(tmp_path / "corpus"), tmp_path / "runs", "limited")
    settings["train"] |= {"steps": 200_000, "eval_every": 200_000}
    settings["parallel"] = {"workers": [1, 4], "ep": "auto", "resources": {"spot": 1}, "grow_after_seconds": 1}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "jobs/train.py", str(tmp_path / "train.yaml")]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | cluster.environment(head)) as job:
        try:
            folder = tmp_path / "runs" / "limited"
            until(lambda: any(line["world_size"] == 2 for line in read_metrics(folder)), PATIENCE)
            assert [node.group for node in running_nodes(head.temp_dir)] == ["spot", "spot"]
        finally:
            job.terminate()
