"""The jobs through Ray's job server: what they know of their submission, how they stop, what the client learns."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.head import fetch
from cluster.local import LocalCluster
from moe_ray.checkpoint.catalog import list_checkpoints, read_manifest
from moe_ray.telemetry.run_log import read_events, read_metrics
from tests.tiny import copy_corpus, tiny_settings

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).resolve().parents[1]
LONG = ("train.steps=2000", "train.global_batch=24", "checkpoint.every=10000")


class Jobs:
    """A cluster, its job server, and settings of a tiny model in a folder."""

    def __init__(self, folder: Path, cluster: LocalCluster) -> None:
        head = cluster.start(8)
        self.environment = os.environ | cluster.environment(head)
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.metrics_url = head.metrics_url
        token = cluster.token_file.read_text()
        self.client = JobSubmissionClient(head.dashboard_url, headers={"Authorization": f"Bearer {token}"})
        (folder / "corpus").mkdir()
        settings = tiny_settings(copy_corpus(folder / "corpus"), folder / "runs", "wiki")
        settings["parallel"] = {"workers": 2, "ep": 2, "cpus_per_worker": 0.5}
        settings["telemetry"] = {"log_format": "json"}
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(settings))
        self.storage = folder / "runs"

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=300)

    def submit(self, id: str, script: str, *arguments: str) -> str:
        words = ["python", f"jobs/{script}.py", *arguments]
        return self.client.submit_job(
            entrypoint=" ".join(words), submission_id=id, runtime_env={"working_dir": str(ROOT)}
        )

    def end(self, id: str) -> JobDetails:
        until(lambda: self.client.get_job_status(id).is_terminal(), 240)
        return self.client.get_job_info(id)

    def log(self, id: str) -> str:
        return self.client.get_job_logs(id)

    def metrics(self) -> str:
        return fetch(self.metrics_url, "").decode()


def until(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    cluster = LocalCluster(folder / "cluster")
    try:
        yield Jobs(folder, cluster)
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def stopped(jobs: Jobs) -> int:
    """The step at which a training job was stopped, while another one failed by a wrong setting."""
    train = ["ray", "job", "submit", "--no-wait", "--working-dir", ".", "--submission-id", "wiki-1"]
    train += ["--metadata-json", '{"team": "nlp"}', "--entrypoint-num-cpus", "0.5"]
    train += ["--runtime-env-json", '{"env_vars": {"RAY_COLOR_PREFIX": "0"}}']
    submitted = jobs.run(*train, "--", "python", "jobs/train.py", str(jobs.config), *LONG)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    jobs.submit("wrong", "train", str(jobs.config), "train.stepz=3")
    until(lambda: len(read_metrics(jobs.storage / "wiki")) > 5, 200)
    until(lambda: 'submission="wiki-1"' in jobs.metrics(), 60)
    done = jobs.run("ray", "job", "stop", "wiki-1")
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(jobs.storage / "wiki")[-1]["step"]


def test_stop_saves_the_step(jobs: Jobs, stopped: int) -> None:
    assert jobs.client.get_job_status("wiki-1") == JobStatus.STOPPED
    assert 5 < stopped < 2000
    assert read_manifest(list_checkpoints(jobs.storage / "wiki")[-1]).step == stopped
    assert f"error: a signal ended the run after step {stopped} of 2000; that step is saved" in jobs.log("wiki-1")


def test_id_and_metadata_are_in_events_and_logs(jobs: Jobs, stopped: int) -> None:
    job, start, *_ = read_events(jobs.storage / "wiki")
    assert (job["event"], job["submission"], job["metadata"]) == ("job", "wiki-1", {"team": "nlp"})
    assert start["event"] == "start"
    text = re.sub(r"^\([^)]*\) ", "", jobs.log("wiki-1"), flags=re.MULTILINE)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert {line["submission"] for line in lines} == {"wiki-1"}
    assert {"moe_ray.training.trainer", "moe_ray.training.events"} <= {line["logger"] for line in lines}


def test_follow_exits_with_the_jobs_own_code(jobs: Jobs, stopped: int) -> None:
    wrong = jobs.run(sys.executable, "-m", "cluster.follow", "wrong")
    assert wrong.returncode == 2
    assert "error: unknown setting" in wrong.stdout
    assert wrong.stderr == "job wrong failed\n"
    ended = jobs.run(sys.executable, "-m", "cluster.follow", "wiki-1")
    assert (ended.returncode, ended.stderr) == (1, "job wiki-1 stopped\n")
    assert "that step is saved" in ended.stdout
    unknown = jobs.run(sys.executable, "-m", "cluster.follow", "nobody")
    assert unknown.returncode == 2
    assert unknown.stderr.startswith("error: job 'nobody' cannot be found")


def test_the_same_submission_goes_on(jobs: Jobs, stopped: int) -> None:
    arguments = [str(jobs.config), *LONG[1:], f"train.steps={stopped + 3}"]
    assert jobs.end(jobs.submit("wiki-2", "train", *arguments)).status == JobStatus.SUCCEEDED, jobs.log("wiki-2")
    last = read_metrics(jobs.storage / "wiki")[-1]
    assert (last["step"], last["resumed_step"], last["redone_steps"]) == (stopped + 3, stopped, 0)
    assert [e["submission"] for e in read_events(jobs.storage / "wiki") if e["event"] == "job"] == [
        "wiki-1",
        "wiki-2",
    ]


@pytest.fixture(scope="module")
def others(jobs: Jobs, stopped: int) -> str:
    """All at once, as each of them mostly waits for its processes to start; returns where the export goes."""
    run, out = str(jobs.storage / "wiki"), str(jobs.storage / "exported")
    chaos = [str(jobs.config), *LONG[:2], "checkpoint.every=200", "train.name=chaos", "--faults=kill_worker"]
    jobs.submit("chaos", "chaos", *chaos)
    jobs.submit("prepare", "prepare", str(jobs.config))
    jobs.submit("evaluate", "evaluate", run)
    jobs.submit("export", "export", run, out)
    jobs.submit("report", "report", run, "tokens=512")
    jobs.submit("doctor", "doctor", run)
    jobs.submit("monitor", "monitor", run, "--port", "0")
    return out


def test_the_other_jobs_run_the_same_way(jobs: Jobs, others: str) -> None:
    expected = {
        "prepare": "all",
        "evaluate": "unigram model",
        "export": others,
        "report": "report.html",
        "doctor": "raises no alert",
    }
    for id, text in expected.items():
        assert jobs.end(id).status == JobStatus.SUCCEEDED, jobs.log(id)
        assert text in jobs.log(id)
    assert "job wiki-1 trains; team nlp" in (jobs.storage / "wiki" / "report.html").read_text()
    until(lambda: "/healthz" in jobs.log("monitor"), 60)
    jobs.client.stop_job("monitor")
    assert jobs.end("monitor").status == JobStatus.STOPPED
    assert "SIGTERM received" not in jobs.log("monitor")


@pytest.mark.usefixtures("others")
def test_stopping_a_chaos_job_saves_the_run_that_trains(jobs: Jobs) -> None:
    """Ray signals both processes, and the one passes the signal on to the other."""
    reference = jobs.storage / "chaos-reference"
    until(lambda: len(read_metrics(reference)) > 5 or jobs.client.get_job_status("chaos").is_terminal(), 200)
    jobs.client.stop_job("chaos")
    assert jobs.end("chaos").status == JobStatus.STOPPED
    last = read_metrics(reference)[-1]["step"]
    assert read_manifest(list_checkpoints(reference)[-1]).step == last
