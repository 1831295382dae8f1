"""A real Ray with a training run, an endpoint under load and the monitor, scraped by a real Prometheus.

Every query of every panel, annotation and alert rule has data, or stands in `ABSENT` with the reason why not.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml

from cluster.head import Head
from cluster.local import LocalCluster
from dashboards.frame import RAY_BOARDS
from moe_ray.telemetry.rules import RULES
from tests.conftest import free_port
from tests.grafana import asked
from tests.prometheus import Prometheus
from tests.test_docs import blocks
from tests.tiny import copy_corpus, tiny_settings
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[1]
WINDOW = "30s"
CLIENTS = 4
PROMETHEUS, MONITOR = blocks("dashboards", "bash")[0].splitlines()
# What matches has no data here.
ABSENT = {
    r"ray_node_(gpus|gram)_|moe_host_gpu_": "there is no GPU",
    r'status=~"5.*300s\]\)\)$': "no request failed with an error of the server, and none was refused",
    r"unless moe_health_score\)$": "the monitor lives; asked again once it has ended",
}


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is ended at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


class Scene:
    """The cluster with all that runs on it."""

    def __init__(self, folder: Path, cluster: LocalCluster, head: Head) -> None:
        self._cluster, self._head = cluster, head
        self.folder, self.monitor_port, self._port = folder, free_port(), free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.environment = os.environ | cluster.environment(head)
        self.environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        (folder / "corpus").mkdir()
        settings = tiny_settings(copy_corpus(folder / "corpus"), folder / "runs", "live")
        settings["train"] |= {"steps": 40, "eval_every": 20}
        (folder / "live.yaml").write_text(yaml.safe_dump(settings))
        self.run_dir = folder / "runs" / "live"

    def ray_knows_prometheus(self) -> bool:
        """What Ray's own dashboard asks before it draws."""
        return self._cluster.get(self._head, "/api/prometheus_health")["result"]

    def train(self) -> None:
        """A run, as a submitted job, and a sweep of one."""
        python = [sys.executable, "jobs/train.py", str(self.folder / "live.yaml")]
        self._run("ray", "job", "submit", "--working-dir", ".", "--", *python)
        space = "sweep.space={optim.lr: {choice: [1.0e-3]}}"
        sweep = ["jobs/sweep.py", python[-1], "train.name=swept", "train.steps=20", space, "sweep.trials=1"]
        self._run(sys.executable, *sweep)

    def _run(self, *command: str) -> None:
        result = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=400
        )
        assert result.returncode == 0, result.stdout + result.stderr

    @contextmanager
    def endpoint(self) -> Iterator[None]:
        """A replica with all caches."""
        memory = ("prefix_memory_bytes", "response_cache_bytes", "response_memory_bytes", "expert_memory_bytes")
        settings = {"min_replicas": 1, "max_replicas": 1, **dict.fromkeys(memory, 10**6)}
        settings |= {name: self.folder / name for name in ("prefix_folder", "response_folder")}
        app = yaml.safe_load((ROOT / "serve_apps/moe_lm.yaml").read_text())
        app["http_options"]["port"] = self._port
        args = {f"serve.{name}": str(value) for name, value in settings.items()}
        app["applications"][0]["args"] = {"checkpoint": str(self.run_dir), **args}
        config = self.folder / "serve.yaml"
        config.write_text(yaml.safe_dump(app))
        command = ["serve", "run", str(config)]
        log = self.folder / "serve.log"
        with running(command, self.environment, log) as process:

            def answers() -> bool:
                assert process.poll() is None, log.read_text()
                try:
                    return httpx.get(f"{self.url}/readyz").status_code == 200
                except httpx.HTTPError:
                    return False

            until(answers, 300)
            yield

    @contextmanager
    def monitor(self) -> Iterator[None]:
        command = MONITOR.replace("/data/runs/wiki", str(self.run_dir)).replace("http://127.0.0.1:8000", self.url)
        # Nothing answers at the second endpoint, so an alert fires.
        command += f" --endpoint http://127.0.0.1:{free_port()} --port {self.monitor_port} --every 1"
        log = self.folder / "monitor.log"
        with running(shlex.split(command), self.environment, log) as process:
            yield
            assert process.poll() is None, log.read_text()

    @contextmanager
    def load(self) -> Iterator[None]:
        """Clients that ask for a little of everything until the end."""
        ended = threading.Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(self._ask, ended) for _ in range(CLIENTS)]
            try:
                yield
            finally:
                ended.set()
        assert [client.result() for client in clients] == [None] * CLIENTS

    def _ask(self, ended: threading.Event) -> None:
        body = {"model": "live", "prompt": "import sys\n" * 4, "max_tokens": 16, "temperature": 1}
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not ended.is_set():
                for more in ({}, {"temperature": 0}, {"prompt": "def", "stream": True}):
                    assert client.post("/v1/completions", json=body | more).status_code == 200
                assert client.post("/v1/completions", json={}).status_code == 400


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Scene, Prometheus]]:
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    # On a busy machine Serve would kill its proxy for a slow start.
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    if shutil.which("prometheus") is None:
        pytest.skip("there is no Prometheus: apt-get install prometheus")
    port, cluster = free_port(), LocalCluster(tmp_path / "cluster")
    monkeypatch.setenv("RAY_PROMETHEUS_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR", str(tmp_path / "grafana"))
    try:
        scene = Scene(tmp_path, cluster, cluster.start(num_cpus=8))
        with Prometheus(PROMETHEUS, tmp_path, port, cluster.targets_file, scene.monitor_port) as prometheus:
            yield scene, prometheus
    finally:
        cluster.stop()


def all_queries() -> dict[str, str]:
    """By where they stand: those of the dashboards, and the numbers that rules compare."""
    queries = {query.where: query.filled(WINDOW) for query in asked()}
    for rule in RULES:
        queries |= {f"{rule.name} / {place}": c.number for place, c in enumerate(rule.conditions)}
    assert len(queries) == len(list(asked())) + sum(len(rule.conditions) for rule in RULES)
    return queries


def is_absent(expr: str) -> bool:
    return any(re.search(pattern, expr) for pattern in ABSENT)


def test_every_query_has_data(scene: tuple[Scene, Prometheus]) -> None:
    stage, prometheus = scene
    assert stage.ray_knows_prometheus()
    rays = {json.loads(path.read_text())["uid"] for path in (stage.folder / "grafana").glob("*.json")}
    assert set(RAY_BOARDS.values()) <= rays, "our links to Ray's dashboards"
    queries = all_queries()
    pending = {where: expr for where, expr in queries.items() if not is_absent(expr)}

    def all_had_data() -> bool:
        for where in [where for where, expr in pending.items() if prometheus.has_data(expr)]:
            del pending[where]
        return not pending

    stage.train()
    with stage.endpoint():
        with stage.monitor(), stage.load():
            with suppress(AssertionError):
                until(all_had_data, 180)
            assert pending == {}
            present = [where for where, expr in queries.items() if is_absent(expr) and prometheus.has_data(expr)]
            assert present == [], "these have data: take them from ABSENT"
        # The monitor has ended.
        until(lambda: prometheus.has_data(queries["MonitorGone / 0"]))
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules} == {rule.name: "ok" for rule in RULES}
