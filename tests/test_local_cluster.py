"""`python -m cluster.local` and the quickstart: what they start is reachable, theirs alone, and ends with them."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from cluster.head import Head, fetch
from cluster.local import LocalCluster
from cluster.processes import MARKER, find_marked
from moe_ray.errors import ConfigError
from tests.tiny import copy_corpus, tiny_settings

ROOT = Path(__file__).resolve().parents[1]


class Owned:
    """A local cluster in a folder of the test, and how the command line sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = LocalCluster(folder)

    def command(self, name: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.local", name, "--dir", str(self.folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def temp_dir(self) -> Path:
        return self.cluster._temp_dir

    def processes(self) -> list[psutil.Process]:
        return find_marked(str(self.temp_dir))

    def head(self) -> Head:
        head = self.cluster.head()
        assert head is not None
        return head

    def assert_gone(self) -> None:
        assert self.processes() == []
        named = [
            p for p in psutil.process_iter(["cmdline"]) if str(self.temp_dir) in " ".join(p.info["cmdline"] or [])
        ]
        assert named == []
        assert not self.temp_dir.exists()
        assert {path.name for path in self.folder.iterdir()} <= {"lock", "head.log"}


@pytest.fixture
def owned(tmp_path: Path) -> Iterator[list[Owned]]:
    """Two clusters that may be started; stopped at the end, however the test ends."""
    clusters = [Owned(tmp_path / "a"), Owned(tmp_path / "b")]
    try:
        yield clusters
    finally:
        for item in clusters:
            item.cluster.stop()


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_two_clusters_live_side_by_side_and_stop_ends_one(owned: list[Owned]) -> None:
    first, second = owned
    for item in owned:
        start = item.command("start")
        output, _ = start.communicate(timeout=300)
        assert start.returncode == 0, output
    for item in owned:
        _check_access(item)
    jobs = [_submit(item, "printenv RAY_ADDRESS") for item in owned]
    for item, job in zip(owned, jobs, strict=True):
        # Ray guesses the address of a job's cluster; with several on a machine it can be another's.
        _await_line(item, job, item.head().gcs_address)
    assert second.cluster.start().pid == second.head().pid

    assert first.cluster.stop()
    first.assert_gone()
    assert not first.cluster.stop()
    assert second.cluster.is_ready()

    # Nothing may be left even where the head cannot end what it started.
    os.kill(second.head().pid, signal.SIGKILL)
    assert second.cluster.stop()
    second.assert_gone()


def _submit(item: Owned, entrypoint: str) -> str:
    request = urllib.request.Request(
        f"{item.head().dashboard_url}/api/jobs/",
        json.dumps({"entrypoint": entrypoint}).encode(),
        {"Authorization": f"Bearer {item.cluster.token_file.read_text()}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["submission_id"]


def _await_line(item: Owned, job: str, line: str) -> None:
    """A job's log can be read a little later than its end is known."""
    _await(lambda: line in item.cluster.get(item.head(), f"/api/jobs/{job}/logs")["logs"].splitlines(), 120)


def _check_access(item: Owned) -> None:
    """Only this machine reaches it, only with the token."""
    head, token_file = item.head(), item.cluster.token_file
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    assert fetch(f"{head.dashboard_url}/api/version", token_file.read_text())
    with pytest.raises(urllib.error.HTTPError) as refused:
        fetch(f"{head.dashboard_url}/api/version", "wrong")
    assert refused.value.code in (401, 403)
    assert b"# TYPE ray_" in fetch(head.metrics_url, "")
    addresses = {
        connection.laddr.ip
        for process in item.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1"}
    environment = subprocess.run(
        ["bash", "-c", f"source '{item.cluster.env_file}'; env"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {f"{name}={value}" for name, value in item.cluster.environment(head).items()} <= set(environment)
    assert not any(line.startswith(MARKER) for line in environment), "stopping would end the user's shell"


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_an_interrupted_start_leaves_nothing(owned: list[Owned]) -> None:
    start = owned[0].command("start")
    _await(lambda: bool(owned[0].processes()), 60)
    start.send_signal(signal.SIGTERM)
    start.communicate(timeout=60)
    assert start.returncode != 0
    owned[0].assert_gone()


def test_stop_spares_a_process_that_got_the_number_of_a_dead_head(owned: list[Owned]) -> None:
    item = owned[0]
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        state = {
            "pid": bystander.pid,
            "started": time.time() - 1000,
            "temp_dir": str(item.temp_dir),
            "num_cpus": 1,
        }
        urls = dict.fromkeys(("gcs_address", "dashboard_url", "agent_url", "metrics_url"), "")
        item.folder.mkdir()
        (item.folder / "state.json").write_text(json.dumps(state | urls))
        assert item.cluster.head() is None
        assert not item.cluster.stop()
        assert bystander.poll() is None
        item.assert_gone()
    finally:
        bystander.kill()
        bystander.wait()


def test_stop_ends_descendants_and_what_lost_its_parent(owned: list[Owned]) -> None:
    item = owned[0]
    script = "(sleep 61 & env -u MOE_RAY_CLUSTER sleep 62 & wait) & sleep 0.2"
    subprocess.run(["bash", "-c", script], env={**os.environ, MARKER: str(item.temp_dir)}, check=True)
    _await(lambda: len(item.processes()) == 3, 10)
    item.folder.mkdir()
    assert item.cluster.stop()
    item.assert_gone()


class Quickstart:
    """A quickstart process in a group of its own, as a shell starts it."""

    def __init__(self, config: Path, *overrides: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "jobs/quickstart.py", str(config), *overrides],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""

    def read_until(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}:\n{self.output}")

    def finish(self) -> int:
        self.output += self.process.communicate(timeout=600)[0]
        return self.process.returncode


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A quickstart that trains in seconds; its cluster is in tmp_path/runs/cluster."""
    (tmp_path / "corpus").mkdir()
    settings = tiny_settings(copy_corpus(tmp_path / "corpus"), tmp_path / "runs", "tiny")
    del settings["train"]["name"], settings["train"]["storage"]
    settings["parallel"] = {"workers": 2, "ep": 2}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def quickstart_cluster(tmp_path: Path) -> Iterator[Owned]:
    """The cluster of `tiny_config`."""
    item = Owned(tmp_path / "runs" / "cluster")
    try:
        yield item
    finally:
        item.cluster.stop()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quickstart_trains_and_serves_and_does_so_again(
    tmp_path: Path, tiny_config: Path, quickstart_cluster: Owned
) -> None:
    storage = f"train.storage={tmp_path / 'runs'}"
    for name in ("one", "two"):
        run = Quickstart(tiny_config, storage, f"train.name={name}", "serve.max_replicas=2")
        assert run.finish() == 0, run.output
        assert "step 12/12" in run.output
        assert "unigram model" in run.output
        assert "Traceback" not in run.output
        assert (tmp_path / "runs" / name / "job.log").exists()
        endpoint = next(line.split()[1] for line in run.output.splitlines() if line.startswith("endpoint"))
        models = json.loads(fetch(f"{endpoint}/models", ""))
        assert [model["id"] for model in models["data"]] == [name]
    head = quickstart_cluster.head()
    serve_details = quickstart_cluster.cluster.get(head, "/api/serve/applications/")
    assert serve_details["applications"]["default"]["status"] == "RUNNING"
    # A job that fails is reported in one line, and the cluster with the served model stays.
    run = Quickstart(tiny_config, storage, "train.name=two", "train.seed=5")
    assert run.finish() != 0
    assert run.output.splitlines()[-1].startswith("error: job quickstart-")
    assert "train.seed=5" in run.output.splitlines()[-1]
    assert quickstart_cluster.cluster.is_ready()
    assert quickstart_cluster.cluster.stop()
    quickstart_cluster.assert_gone()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ctrl_c_in_training_leaves_no_process(
    tmp_path: Path, tiny_config: Path, quickstart_cluster: Owned
) -> None:
    run = Quickstart(tiny_config, f"train.storage={tmp_path / 'runs'}", "train.steps=1000000")
    run.read_until("step 3/")
    assert len(quickstart_cluster.processes()) > 10
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.finish() == 128 + signal.SIGINT
    assert "Traceback" not in run.output
    quickstart_cluster.assert_gone()


def test_a_wrong_setting_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    run = Quickstart(ROOT / "jobs/configs/quickstart.yaml", "train.stepz=5", f"train.storage={tmp_path}")
    assert run.finish() == 2
    assert len(run.output.splitlines()) == 1
    assert "train.steps" in run.output
    assert not (tmp_path / "cluster").exists()


def _await(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [-1, 0, 10**12])
def test_no_number_of_cpus_is_refused(owned: list[Owned], number: int) -> None:
    with pytest.raises(ConfigError, match=f"--num-cpus {number} is no number of CPUs.*1 to 1024"):
        owned[0].cluster.start(number)
    assert not owned[0].folder.exists()
