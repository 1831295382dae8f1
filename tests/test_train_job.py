"""`jobs/train.py` on a real Ray cluster: submitted and not, killed and run again, and with damaged storage."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.local import LocalCluster
from moe_ray.checkpoint.catalog import list_checkpoints, read_manifest
from moe_ray.telemetry.run_log import read_metrics
from tests.conftest import RayCluster
from tests.multi_node import train_workers
from tests.tiny import copy_corpus, tiny_settings

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("job")
    corpus = folder / "corpus"
    corpus.mkdir()
    tree = tiny_settings(copy_corpus(corpus), folder / "runs", "run")
    return tree | {"parallel": {"workers": 2, "ep": 2, "cpus_per_worker": 0.5}}


class Job:
    """`jobs/train.py` as a subprocess with a config file of its own."""

    def __init__(self, cluster: RayCluster, settings: dict[str, Any]) -> None:
        self._cluster = cluster
        self._settings = settings
        self.storage = Path(settings["train"]["storage"])
        self._config = self.storage.parent / "config.yaml"
        self._config.write_text(yaml.safe_dump(settings))

    def command(self, *overrides: str) -> list[str]:
        return ["jobs/train.py", str(self._config), *overrides]

    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"RAY_ADDRESS": self._cluster.address, "PATH": path}

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *self.command(*overrides)],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *overrides: str) -> tuple[int, str]:
        process = self.start(*overrides)
        output, _ = process.communicate(timeout=200)
        return process.returncode, output

    def losses(self, name: str) -> list[float]:
        metrics = read_metrics(self.storage / name)
        assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
        return [m["loss"] for m in metrics]


@pytest.fixture(scope="module")
def job(ray_cluster: RayCluster, settings: dict[str, Any]) -> Job:
    return Job(ray_cluster, settings)


@pytest.fixture(scope="module")
def undisturbed(job: Job) -> list[float]:
    code, output = job.run("train.name=undisturbed")
    assert code == 0, output
    assert re.search(r"step 12/12  loss \d\.\d+  [\d,]+ tokens/s  load cv \d\.\d+  ETA 0:00:00", output)
    assert f"run directory: {job.storage / 'undisturbed'}" in output.splitlines()
    return job.losses("undisturbed")


@pytest.fixture
def running(job: Job) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a long run and returns once it has passed step 5; kills its driver at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *overrides: str) -> subprocess.Popen[str]:
        process = job.start(f"train.name={name}", "checkpoint.every=2", "checkpoint.keep_last=99", *overrides)
        started.append(process)
        while len(read_metrics(job.storage / name)) < 5:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_undisturbed_run_learns(undisturbed: list[float]) -> None:
    assert len(undisturbed) == 12
    assert undisturbed[-1] < undisturbed[0]


def test_run_goes_on_when_a_worker_is_killed(
    job: Job, undisturbed: list[float], running: Callable[..., subprocess.Popen[str]]
) -> None:
    process = running("worker-killed")
    victims = train_workers()
    assert victims
    victims[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert re.search(r"workers \[\d.*\] failed .*; starting again", output), output
    assert job.losses("worker-killed") == pytest.approx(undisturbed, rel=1e-4)
    last = read_metrics(job.storage / "worker-killed")[-1]
    assert 0 < last["resumed_step"] < 12
    assert last["redone_steps"] <= 2


def test_killed_driver_resumes(
    job: Job, undisturbed: list[float], running: Callable[..., subprocess.Popen[str]]
) -> None:
    process = running("driver-killed")
    process.kill()
    process.communicate()
    psutil.wait_procs(train_workers(), timeout=60)
    code, output = job.run("train.name=driver-killed")
    assert code == 0, output
    assert job.losses("driver-killed") == pytest.approx(undisturbed, rel=1e-4)


def test_sigterm_saves_the_step_and_a_second_job_is_refused_meanwhile(
    job: Job, undisturbed: list[float], running: Callable[..., subprocess.Popen[str]]
) -> None:
    process = running("ended", "train.steps=400", "train.global_batch=48")
    code, refusal = job.run("train.name=ended", "train.global_batch=48")
    assert code == 2, refusal
    assert re.search(r"ended' is being trained by another job \(host \S+, process \d+", refusal), refusal
    process.terminate()
    assert process.stdout is not None
    assert any("SIGTERM: saving a checkpoint" in line for line in process.stdout)
    # Whoever stops a process and its parent sends it twice, if the parent passes it on.
    process.terminate()
    output = process.stdout.read()
    process.wait(60)
    assert process.returncode == 1, output
    (step,) = re.findall(
        r"^error: a signal ended the run after step (\d+) of 400; that step is saved", output, re.M
    )
    assert read_manifest(list_checkpoints(job.storage / "ended")[-1]).step == int(step)
    code, output = job.run("train.name=ended", "train.global_batch=48", f"train.steps={int(step) + 4}")
    assert code == 0, output
    last = read_metrics(job.storage / "ended")[-1]
    assert (last["resumed_step"], last["redone_steps"]) == (int(step), 0)


@pytest.fixture
def owned_cluster(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A cluster whose job agent has a port of its own, and the environment that leads there."""
    cluster = LocalCluster(tmp_path / "cluster")
    try:
        yield os.environ | cluster.environment(cluster.start(4))
    finally:
        cluster.stop()


def test_submitted_job_runs_from_its_own_copy(
    job: Job, owned_cluster: dict[str, str], undisturbed: list[float]
) -> None:
    ray_cli = str(Path(sys.executable).parent / "ray")
    command = [ray_cli, "job", "submit", "--working-dir", ".", "--", "python"]
    command += job.command("train.name=submitted")
    result = subprocess.run(command, env=owned_cluster, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert job.losses("submitted") == pytest.approx(undisturbed, rel=1e-6)
    relative = subprocess.run([*command, "train.storage=runs"], env=owned_cluster, capture_output=True, text=True)
    assert relative.returncode != 0
    assert "error: train.storage='runs' is relative" in relative.stdout + relative.stderr


def test_damaged_checkpoint_is_named_and_the_one_before_is_used(job: Job, undisturbed: list[float]) -> None:
    """Uses the finished run: one more run with the last checkpoint damaged does its last steps again."""
    newest = list_checkpoints(job.storage / "undisturbed")[-1]
    damaged = next(newest.glob("model-*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    code, output = job.run("train.name=undisturbed")
    assert code == 0, output
    assert f"{str(damaged)!r} is damaged" in output
    assert job.losses("undisturbed") == pytest.approx(undisturbed, rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources=[/nowhere/*.txt]"], "/nowhere"),
        (["model.dim=128"], "model.dim=128 differs from the run"),
        (["parallel.ep=3"], "parallel.ep=3 does not divide parallel.workers=2"),
    ],
)
def test_user_errors_exit_2_and_lose_nothing(
    job: Job, undisturbed: list[float], overrides: list[str], message: str
) -> None:
    code, output = job.run("train.name=undisturbed", *overrides)
    assert code == 2
    assert output.strip().splitlines()[-1].startswith("error: ")
    assert message in output
    assert len(job.losses("undisturbed")) == 12
