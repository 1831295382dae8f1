"""The monitor as a process, and beside a real cluster: health over HTTP, dead replicas, queues."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.monitor import build_watcher
from moe_ray.config import build_config, to_yaml
from moe_ray.telemetry.alerts import Alert, State
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.rules import IN_PROCESS
from tests.conftest import free_port
from tests.test_follow import BODY, Run
from tests.tiny import tiny_settings
from tests.waiting import until


def make_run(folder: Path, **last: float) -> Path:
    """A run that stopped in the middle, as its files tell."""
    config = build_config(tiny_settings(folder, folder, "run"))
    config.train.run_dir.mkdir()
    (config.train.run_dir / "config.yaml").write_text(to_yaml(config))
    record = {"step": 6, "time": time.time(), "step_seconds": 0.1, "loss": 3.0, **last}
    (config.train.run_dir / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return config.train.run_dir


def test_the_monitor_serves_health_and_metrics_and_ends_by_a_signal(tmp_path):
    run, port = make_run(tmp_path), free_port()
    command = [sys.executable, "jobs/monitor.py", str(run), "--port", str(port), "--every", "0.2"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    monitor = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"

    def status(loss_over_best: float) -> int | None:
        record = {"step": 7, "time": time.time(), "step_seconds": 0.1, "loss_over_best": loss_over_best}
        with (run / "metrics.jsonl").open("a") as log:
            log.write(json.dumps(record) + "\n")
        try:
            return httpx.get(f"{url}/healthz").status_code
        except httpx.TransportError:
            return None

    try:
        until(lambda: status(1.0) == 200, seconds=60)
        until(lambda: status(2.0) == 503)
        training = httpx.get(f"{url}/healthz").json()["components"]["training"]
        assert training["status"] == "unhealthy"
        (alert,) = training["alerts"]
        assert (alert["alert"], alert["labels"]) == ("LossExploding", {"run": "run"})
        assert "optim.lr" in alert["action"]
        found = {}
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
            metric = CATALOGUE[family.name]
            assert (family.type, family.documentation) == ("gauge", metric.help)
            for sample in family.samples:
                assert set(sample.labels) == set(metric.labels)
                found[sample.name, sample.labels.get("component") or sample.labels.get("alert")] = sample.value
        assert found["moe_health_score", "training"] == 0
        assert found["moe_health_score", "host"] in (0.5, 1)
        assert found["moe_alert_firing", "LossExploding"] == 1
        assert found["moe_alert_firing", "StepsSkipped"] == 0
        assert {label for name, label in found if name == "moe_alert_firing"} == {rule.name for rule in IN_PROCESS}
        assert httpx.get(f"{url}/other").status_code == 404
        until(lambda: status(1.0) == 200)
        monitor.send_signal(signal.SIGTERM)
        _, log = monitor.communicate(timeout=30)
    finally:
        monitor.kill()
        monitor.wait()
    assert monitor.returncode == 0
    assert log.count("LossExploding: the loss of run run is 2.00 times") == 1
    assert log.count("resolved LossExploding (run=run)") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["/nowhere"], "is no run"), (["--webhook-file", "/nowhere"], "telemetry.webhook_file")],
)
def test_mistakes_are_told_in_a_line(arguments, said):
    command = [sys.executable, "jobs/monitor.py", "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.startswith("error: ")


def test_what_cannot_be_observed_is_an_alert_of_its_own(tmp_path):
    run = make_run(tmp_path)
    watcher, now = build_watcher([str(run)], [], []), time.time()
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    for seconds in (0, 31):
        watcher.round(now + seconds)
    firing = [(alert.rule.name, dict(alert.labels)) for alert in watcher.alerts.active()]
    assert ("MonitorBlind", {"source": "run run"}) in firing


@pytest.fixture(scope="module")
def served(ray_cluster, tmp_path_factory):
    """Two replicas that decode one request at a time, and the address."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve_apps.moe_lm import build

    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    run = Run(folder)
    run.save(1)
    settings = {"min_replicas": 2, "max_replicas": 2, "max_batch_size": 1, "max_queued_requests": 64}
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    try:
        args = {f"serve.{name}": str(value) for name, value in settings.items()}
        serve.run(build({"checkpoint": str(run.path), **args}), name="moe_lm")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


class Watched:
    """A watcher of the endpoint and its cluster, with time that can be made to pass."""

    def __init__(self, url: str, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_ADDRESS", address)
        self.told: list[tuple[str, str]] = []
        self.watcher = build_watcher([], [url], [], [self._note])
        self.passed = 0.0

    def _note(self, alert: Alert) -> None:
        if alert.rule.component in ("serving", "cluster"):
            self.told.append((alert.rule.name, str(alert.state)))

    def round(self, passed: float = 0.0) -> list[tuple[str, str]]:
        self.passed += passed
        self.watcher.round(time.time() + self.passed)
        return self.told


@pytest.mark.cluster
def test_a_dead_replica_is_told_once_and_resolves(served, ray_cluster, monkeypatch):
    import ray

    watched = Watched(served, ray_cluster.address, monkeypatch)
    assert watched.round() == []
    actors = ray._private.state.state.actor_table(None, actor_state_name="ALIVE").values()
    pid = next(actor["Pid"] for actor in actors if actor["ActorClassName"].startswith("ServeReplica:moe_lm"))
    os.kill(pid, signal.SIGKILL)
    until(lambda: watched.round() != [], seconds=60)
    assert watched.told == [("ReplicaDied", "firing")]
    until(lambda: _replicas(served) == 2, seconds=120)
    # The dashboard may say later than Serve that it runs.
    until(lambda: watched.round() and not watched.watcher.alerts.active(State.PENDING), seconds=60)
    # Ten minutes later nothing has died for ten minutes.
    assert watched.round(passed=700) == [("ReplicaDied", "firing"), ("ReplicaDied", "resolved")]


def _replicas(url: str) -> int:
    from ray import serve

    (deployment,) = serve.status().applications["moe_lm"].deployments.values()
    return deployment.replica_states.get("RUNNING", 0) if httpx.get(f"{url}/readyz").status_code == 200 else 0


@pytest.mark.cluster
def test_a_growing_queue_is_told_and_resolves(served, ray_cluster, monkeypatch):
    watched, done = Watched(served, ray_cluster.address, monkeypatch), threading.Event()

    def load() -> None:
        with httpx.Client(timeout=120) as client:
            while not done.is_set():
                client.post(f"{served}/v1/completions", json=BODY)

    threads = [threading.Thread(target=load) for _ in range(16)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: ("QueueGrowing", "firing") in watched.round(passed=5), seconds=90)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    until(lambda: ("QueueGrowing", "resolved") in watched.round(), seconds=60)
    assert watched.told.count(("QueueGrowing", "firing")) == 1
