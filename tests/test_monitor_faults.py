"""The monitor and the watch of a training command where clocks, storage, names and webhooks fail."""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, start_http_server

from cluster.local import LocalCluster
from cluster.observe import agent_samples, endpoint_samples
from jobs.monitor import build_watcher, main
from moe_ray.config import build_config
from moe_ray.errors import ConfigError
from moe_ray.storage import open_storage
from moe_ray.telemetry.alerts import Alert, Alerts, State
from moe_ray.telemetry.notify import Webhook
from moe_ray.telemetry.rules import RULES
from moe_ray.telemetry.run_log import ALERTS
from moe_ray.telemetry.watcher import watch_training
from moe_ray.training.measure import LossTrend
from tests.conftest import free_port
from tests.made_runs import START, metrics_line, write_run
from tests.s3_server import S3Server
from tests.waiting import until

STALLED = next(rule for rule in RULES if rule.name == "TrainingStalled")


def test_a_clock_that_is_set_back_ends_no_watch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics_line(1, time=START)])
    watcher = build_watcher([str(run)], [], [])
    watcher.round(START + 3000)
    back = START - 3600
    for step in (2, 3):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics_line(step, time=back + step)) + "\n")
        watcher.round(back + step)
    assert [value for _, value in watcher.store.at("moe_train_step", back + 3)] == [3]
    assert not [alert for alert in watcher.alerts.active() if alert.rule is STALLED]
    watcher.round(back + 3000)
    assert [alert for alert in watcher.alerts.active() if alert.rule is STALLED]


def test_an_alert_is_told_again_when_its_cooldown_began_in_the_future(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics_line(1, time=START)])
    told: list[Alert] = []
    watcher = build_watcher([str(run)], [], [], [told.append])
    watcher.round(START + 9000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_line(2, time=START + 100)) + "\n")
    watcher.round(START + 101)
    watcher.round(START + 300)
    states = [alert.state for alert in told if alert.rule is STALLED]
    assert states == [State.FIRING, State.RESOLVED, State.FIRING]


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    runs = [str(write_run(tmp_path / folder / "run", [metrics_line(1)])) for folder in "ab"]
    with pytest.raises(ConfigError, match="several runs are called 'run'"):
        build_watcher(runs, [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--port", "99999"], "cannot listen on 127.0.0.1:99999"), (["--every", "0"], "--every=0 is not allowed")],
)
def test_options_that_are_not_allowed_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(options)


def test_what_happened_long_ago_is_counted_but_no_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [metrics_line(step, skipped_steps=1) for step in range(1, 5001)]
    run = write_run(tmp_path / "run", lines, steps=10_000)
    moments: list[float] = []
    update = Alerts.update
    monkeypatch.setattr(Alerts, "update", lambda *args: (moments.append(args[2]), update(*args))[1])
    watcher = build_watcher([str(run)], [], [])
    watcher.round(START + 5000)
    assert min(moments) > START + 4400
    assert [value for _, value in watcher.store.at("moe_train_skipped_steps", START + 5000)] == [5000]


@pytest.mark.parametrize("url", ["https://hooks..example.test/secret", "https://127.0.0.1:1/geheim-\u00e9"])
def test_a_url_that_cannot_be_asked_ends_no_webhook(url: str, caplog: pytest.LogCaptureFixture) -> None:
    webhook = Webhook(url)
    alert = Alert(STALLED, (("run", "wiki"),), State.FIRING, 0.0, 61.0)
    with caplog.at_level(logging.ERROR):
        webhook(alert)
        until(lambda: webhook._queue.empty())
        webhook.close()
    assert "did not take TrainingStalled" in caplog.text
    assert "secret" not in caplog.text
    assert "geheim" not in caplog.text


def test_the_last_alerts_of_a_run_in_an_object_store_are_kept(s3: S3Server) -> None:
    config = build_config({"train": {"storage": s3.fresh_uri(), "name": "run"}})
    run = open_storage(config.train.run_uri)
    with watch_training(run, config):
        now = time.time()
        lines = [metrics_line(n, loss_over_best=9.0, skipped_steps=1, time=now + n / 1000) for n in (1, 2)]
        run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    told = {json.loads(line)["alert"] for line in run.read(ALERTS).splitlines()}
    assert told >= {"LossExploding", "StepsSkipped"}


def test_a_run_without_alerts_has_no_file_of_them(tmp_path: Path) -> None:
    config = build_config({"train": {"storage": str(tmp_path), "name": "run"}})
    with watch_training(open_storage(config.train.run_uri), config):
        pass
    found = [json.loads(line) for path in tmp_path.rglob(ALERTS) for line in path.read_text().splitlines()]
    # What else runs on this machine may raise some.
    assert all(record["component"] == "host" for record in found)


def test_a_run_that_has_ended_raises_no_alert_until_it_goes_on(tmp_path: Path) -> None:
    steps = build_config({}).train.steps
    ill = {"loss_over_best": 9.0, "skipped_steps": 1}
    run = write_run(
        tmp_path / "run", [metrics_line(step, time=START + step, **ill) for step in range(1, steps + 1)]
    )
    told: list[str] = []
    watcher = build_watcher([str(run)], [], [], [lambda alert: told.append(alert.rule.name)])
    for seconds in (1, 40):
        watcher.round(START + steps + seconds)
    assert not {"LossExploding", "StepsSkipped"} & set(told)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(metrics_line(steps + 1, time=START + steps + 41, **ill)) + "\n")
    watcher.round(START + steps + 42)
    assert {"LossExploding", "StepsSkipped"} <= set(told)


@contextmanager
def no_http() -> Generator[str]:
    """The address of a server that talks, but not HTTP."""

    class Talk(BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(b"SSH-2.0-x\r\n")

    with ThreadingTCPServer(("127.0.0.1", 0), Talk) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_an_endpoint_that_talks_no_http_is_not_ready_and_hides_no_other() -> None:
    with no_http() as url:
        found = endpoint_samples([url, "http://127.0.0.1:99999"])
    assert [(sample.labels["app"], sample.value) for sample in found] == [
        (url, 0.0),
        ("http://127.0.0.1:99999", 0.0),
    ]


def test_what_agents_say_of_a_run_that_is_followed_is_not_counted_again(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    events = Counter("ray_moe_train_events", "Failures.", ["run", "event"], registry=registry)
    for run in ("wiki", "other"):
        events.labels(run, "failure").inc(4)
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        found = agent_samples([f"http://127.0.0.1:{server.server_port}/metrics"], ["wiki"])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert [(sample.name, sample.labels["run"], sample.value) for sample in found] == [
        ("moe_train_events", "other", 4)
    ]


@pytest.mark.cluster
def test_a_ray_head_that_goes_away_is_an_alert_and_endpoints_are_still_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = LocalCluster(Path(tempfile.mkdtemp(prefix="mr-", dir="/tmp")))
    now = time.time()
    try:
        for name, value in cluster.environment(cluster.start(num_cpus=1, proxy="plain")).items():
            monkeypatch.setenv(name, value)
        watcher = build_watcher([], [f"http://127.0.0.1:{free_port()}"], [])
        watcher.round(now)
        assert [value for _, value in watcher.store.at("moe_cluster_nodes", now)] == [1]
    finally:
        cluster.stop()
    for seconds in (1, 40):
        watcher.round(now + seconds)
    firing = {(alert.rule.name, dict(alert.labels).get("source")) for alert in watcher.alerts.active()}
    assert firing >= {("EndpointNotReady", None), ("MonitorBlind", "ray"), ("MonitorBlind", "agents")}
    assert not list(watcher.store.at("moe_cluster_nodes", now + 400))


@pytest.mark.cluster
def test_a_ray_that_is_not_there_holds_no_monitor_up(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "jobs/monitor.py", "--port", str(port), "--every", "0.2"]
    environment = {**os.environ, "RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    monitor = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def sources() -> set[str]:
        try:
            alerts = httpx.get(f"http://127.0.0.1:{port}/healthz").json()["components"]["monitor"]["alerts"]
        except (httpx.TransportError, KeyError):
            return set()
        return {alert["labels"]["source"] for alert in alerts}

    try:
        until(lambda: sources() == {"ray"}, seconds=120)
        monitor.send_signal(signal.SIGTERM)
        _, log = monitor.communicate(timeout=30)
    finally:
        monitor.kill()
        monitor.wait()
    assert monitor.returncode == 0
    assert "MonitorBlind: the monitor cannot observe ray" in log


def test_a_loss_of_zero_has_no_ratio() -> None:
    trend = LossTrend()
    assert [trend.add(loss) for loss in (0.0, 0.0, None)] == [None, None, None]
