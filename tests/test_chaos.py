"""`jobs/chaos.py`: its schedule, its verdict, and all its faults on a real cluster of several nodes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_ray.checkpoint.catalog import list_steps
from moe_ray.config import Config, build_config
from moe_ray.errors import ConfigError
from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import read_metrics
from moe_ray.training.chaos.network import insert_proxy
from moe_ray.training.chaos.report import (
    LossDifference,
    Row,
    differing_steps,
    loss_difference,
    problems,
    table,
)
from moe_ray.training.chaos.schedule import Fault, plan_faults, redone_limit, settle_steps
from moe_ray.training.chaos.trace import Strike, Trace
from tests.s3_server import S3Server
from tests.tiny import copy_corpus, tiny_settings

SAME = LossDifference(0.0, 0.0)
# A lost node is noticed by its missing health checks.
CLUSTER_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "1000",
}


@pytest.fixture
def config() -> Config:
    return build_config({"train": {"steps": 400}, "checkpoint": {"every": 5}, "optim": {"warmup_steps": 2}})


def line(step: int, time: float, resumed: int = 0, redone: int = 0, failed: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "time": time,
        "loss": 1.0 / step,
        "sample_checksum": step * 7,
        "resumed_step": resumed,
        "redone_steps": redone,
        "failed_checkpoints": failed,
    }


def test_schedule_is_a_function_of_its_seed(config: Config) -> None:
    plan = plan_faults(list(Fault), 11, 3, config)
    assert plan == plan_faults(list(Fault), 11, 3, config)
    assert plan != plan_faults(list(Fault), 11, 4, config)
    assert sorted(planned.fault for planned in plan) == sorted(Fault)


@pytest.mark.parametrize("seed", range(20))
def test_faults_leave_one_another_room(config: Config, seed: int) -> None:
    steps = [planned.step for planned in plan_faults([Fault.KILL_WORKER, Fault.ADD_NODE], 7, seed, config)]
    settle = settle_steps(config)
    assert min(steps) >= settle
    assert max(steps) <= config.train.steps - settle
    assert all(later - earlier > settle for earlier, later in pairwise(steps))


def test_short_run_has_no_room_for_many_faults(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=400 is too short for 40 faults"):
        plan_faults(list(Fault), 40, 0, config)


def test_trace_of_a_restart() -> None:
    trace = Trace(Strike(Fault.KILL_WORKER, time=100.0, step=13, resumed_step=0))
    trace.look([line(13, 99.0), line(14, 100.1)], [{"event": "start", "time": 50.0}])
    assert trace.recovery_seconds is None
    trace.look(
        [line(11, 108.0, 10, 4), line(12, 108.1, 10, 4)],
        [{"event": "failure", "time": 102.0}, {"event": "start", "time": 104.0}],
    )
    trace.look([line(20, 120.0, 15), line(40, 122.0, 15)], [])
    assert trace.detection_seconds == pytest.approx(2.0)
    assert trace.recovery_seconds == pytest.approx(8.0)
    assert trace.redone_steps == 4
    assert trace.resumed_step == 10
    assert trace.has_settled(25)
    assert not trace.has_settled(28)


def test_redone_steps_of_an_attempt_that_logged_nothing_count() -> None:
    trace = Trace(Strike(Fault.KILL_WORKER, time=100.0, step=13, resumed_step=0))
    trace.look([line(6, 108.0, 5, 0)], [])
    assert trace.redone_steps == 8


def test_trace_of_an_outage_that_training_outlives() -> None:
    trace = Trace(Strike(Fault.FULL_DISK, time=100.0, step=10, resumed_step=5))
    trace.look([line(11, 100.5, 5), line(12, 101.0, 5, failed=1), line(13, 106.5, 5)], [])
    assert trace.detection_seconds == pytest.approx(1.0)
    assert trace.recovery_seconds == pytest.approx(6.5)
    assert trace.redone_steps == 0
    assert trace.resumed_step is None


def test_samples_are_compared_step_by_step() -> None:
    reference = [line(step, float(step)) for step in (1, 2, 3, 4)]
    other = line(2, 2.0) | {"sample_checksum": 1}
    assert differing_steps(reference, reference) == []
    assert differing_steps(reference, [reference[0], other, reference[3]]) == [2, 3]
    assert differing_steps(reference, [*reference, reference[0]]) == [1]


def test_losses_are_compared_step_by_step() -> None:
    reference = [line(1, 1.0), line(2, 2.0)]
    disturbed = [line(1, 1.0) | {"loss": 1.001}, line(2, 2.0)]
    assert loss_difference(reference, disturbed) == LossDifference(0.0, pytest.approx(1e-3))
    skipped = [line(1, 1.0) | {"loss": None}, line(2, 2.0)]
    assert loss_difference(skipped, skipped) == SAME
    assert loss_difference(reference, skipped).largest == float("inf")


@pytest.mark.parametrize(
    ("row", "num_lost", "loss", "message"),
    [
        (Row(Fault.KILL_WORKER, 9, 1.0, 2.0), 1, SAME, "1 steps have other samples"),
        (Row(Fault.KILL_WORKER, 9, 1.0, 2.0, 7), 0, SAME, "cost 7 steps, more than 6"),
        (Row(Fault.TERM_WORKER, 9, 1.0, 2.0, 2), 0, SAME, "cost 2 steps, more than 1"),
        (Row(Fault.KILL_WORKER, 9, 1.0), 0, SAME, "never recovered"),
        (Row(Fault.CORRUPT_CHECKPOINT, 9, 1.0, 2.0, wrong="was used"), 0, SAME, "was used"),
        (Row(Fault.KILL_WORKER, 9, 1.0, 2.0), 0, LossDifference(0.0, 2e-4), "the loss differs by up to 2.0e-04"),
        (Row(Fault.KILL_WORKER, 9, 1.0, 2.0), 0, LossDifference(0.0, float("nan")), "the loss differs"),
    ],
)
def test_broken_promise_is_named(
    config: Config, row: Row, num_lost: int, loss: LossDifference, message: str
) -> None:
    (problem,) = problems([row], num_lost, loss, config)
    assert message in problem


def test_kept_promises(config: Config) -> None:
    skipped = Row(Fault.CUT_STORAGE, 80, note="no object store", was_run=False)
    rows = [Row(fault, 9, 1.0, 2.0, redone_limit(fault, config)) for fault in Fault]
    assert problems([*rows, skipped], 0, LossDifference(9e-5, 9e-5), config) == []


def test_table() -> None:
    text = table([Row(Fault.KILL_WORKER, 9, 1.26, 8.0, 4, 0, "worker 7"), Row(Fault.ADD_NODE, 30, was_run=False)])
    header, ran, not_run = text.splitlines()
    assert header.split()[:3] == ["fault", "at", "step"]
    assert ran.split() == ["kill_worker", "9", "1.3", "8.0", "4", "0", "worker", "7"]
    assert not_run.split() == ["add_node", "30", "-", "-", "-", "-", "not", "run:"]


def test_only_plain_http_gets_a_proxy() -> None:
    assert insert_proxy("/runs", "127.0.0.1") == ("/runs", None)
    tls = "s3://b/x?endpoint_override=h:1"
    assert insert_proxy(tls, "127.0.0.1") == (tls, None)
    uri, proxy = insert_proxy("s3://b/x?endpoint_override=h:1&scheme=http&region=r", "127.0.0.1")
    assert proxy is not None
    assert uri == f"s3://b/x?endpoint_override=127.0.0.1:{proxy.port}&scheme=http&region=r"
    proxy.cut()


@pytest.fixture
def nodes() -> Iterator[str]:
    """Address of a cluster of a head without CPUs and three nodes with one each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as environment:
        for name, value in CLUSTER_ENVIRONMENT.items():
            environment.setenv(name, value)
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=0, object_store_memory=100_000_000)
            for _ in range(3):
                cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
            cluster.wait_for_nodes()
            yield cluster.address
        finally:
            cluster.shutdown()


def start(tmp_path: Path, address: str, storage: str, *options: str) -> subprocess.Popen[str]:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    settings = tiny_settings(copy_corpus(corpus), tmp_path / "runs", "run")
    settings["train"] |= {"storage": storage, "steps": 400, "global_batch": 48, "eval_every": 1000}
    settings["optim"]["lr"] = 1e-3
    settings["checkpoint"] |= {"every": 5, "retry_seconds": 1, "max_failures": 1000}
    settings["parallel"] = {"workers": [1, 4], "ep": "auto", "grow_after_seconds": 2, "timeout_seconds": 10}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return subprocess.Popen(
        [sys.executable, "jobs/chaos.py", str(tmp_path / "tiny.yaml"), *options],
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def chaos(tmp_path: Path, address: str, storage: str, *options: str) -> str:
    """Output of a job that passes."""
    with start(tmp_path, address, storage, *options) as process:
        output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    print(output)
    return output


def rows(output: str) -> dict[str, list[str]]:
    """Cells of the table by fault."""
    lines = output[output.rindex("at step") :].splitlines()[1:]
    cells = [re.split(r"\s{2,}", text) for text in lines if text]
    return {row[0]: row[1:] for row in cells if row[0] in set(Fault)}


@pytest.mark.cluster
@pytest.mark.slow
def test_ctrl_c_ends_both(nodes: str, tmp_path: Path) -> None:
    storage = tmp_path / "runs"
    with start(tmp_path, nodes, str(storage), "--faults", "kill_worker") as process:
        assert process.stdout is not None
        run = storage / "run-reference"
        while not read_metrics(run):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert output.endswith("stopping: the run that is training saves its step and ends\n")
    assert "Traceback" not in output
    assert max(list_steps(open_storage(str(run)))) == read_metrics(run)[-1]["step"]


@pytest.mark.parametrize("option", ["--count=0", "--seed=-1", "--outage-seconds=nan", "--drain-seconds=0"])
def test_number_out_of_range_is_refused(option: str) -> None:
    result = subprocess.run(
        [sys.executable, "jobs/chaos.py", "jobs/configs/quickstart.yaml", option], capture_output=True, text=True
    )
    assert result.returncode == 2
    assert re.fullmatch(rf"error: {option[:-1]}\S+ is not allowed\. Fix: .*\n", result.stderr)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_all_faults_of_a_cluster_with_a_small_disk(nodes: str, disk: Path, tmp_path: Path) -> None:
    found = rows(chaos(tmp_path, nodes, str(disk)))
    assert found.keys() == set(Fault)
    cut = found.pop(Fault.CUT_STORAGE)
    assert cut[-1].startswith("not run: train.storage is no s3://")
    for fault, row in found.items():
        _, detected, recovered, redone, lost, _note = row
        assert float(recovered) >= 0, row
        assert int(redone) <= 11, row
        assert lost == "0", row
        assert fault == Fault.KILL_DRIVER or float(detected) >= 0, row


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(900)
def test_faults_with_an_object_store(nodes: str, s3: S3Server, tmp_path: Path) -> None:
    faults = [Fault.CUT_STORAGE, Fault.KILL_WORKER, Fault.CORRUPT_CHECKPOINT, Fault.FULL_DISK]
    output = chaos(tmp_path, nodes, s3.fresh_uri(), "--faults", ",".join(faults))
    assert "passed: 3 of 4 faults struck" in output
    found = rows(output)
    assert found.keys() == set(faults)
    assert found[Fault.FULL_DISK][-1] == "not run: the storage is no disk"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)
