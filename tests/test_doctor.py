"""The doctor, and the commands of the page on monitoring, as a user starts them."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import yaml

from jobs.checks import check_limits, check_packages, check_ports, check_storage
from tests.conftest import free_port
from tests.test_monitor import make_run
from tests.waiting import until

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
PAGE = Path("docs/monitoring.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def command(line: str) -> list[str]:
    return [sys.executable, *shlex.split(line)[1:]]


def test_the_commands_of_the_page(tmp_path):
    # Finished: otherwise it counts as stalled after a minute.
    run = make_run(tmp_path, step=12)
    monitor, doctor = (block.replace("/data/runs/wiki", str(run)) for block in blocks("bash"))
    port = free_port()
    line = monitor.replace("9108", str(port)).replace("8000", str(free_port())).replace("/data ", f"{tmp_path} ")
    process = subprocess.Popen(command(line), env=ENVIRONMENT)
    try:
        until(lambda: _answers(f"http://127.0.0.1:{port}/healthz"), seconds=60)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    done = subprocess.run(command(doctor), env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert "problem " not in done.stdout
    assert done.returncode == 0
    told = {line.split()[1] for line in done.stdout.splitlines() if re.match(r"(ok|warning) ", line)}
    assert told >= {"python", "packages", "collectives", "storage", "native", "haproxy", "cluster", "ports"}


def _answers(url: str) -> bool:
    try:
        return "components" in httpx.get(url).json()
    except httpx.TransportError:
        return False


def test_a_run_that_is_ill_is_a_problem_with_its_fix(tmp_path):
    run = make_run(tmp_path, loss_over_best=3.0)
    done = subprocess.run(
        command(f"python jobs/doctor.py {run} --json"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    (found,) = [line for line in json.loads(done.stdout) if line["level"] == "problem"]
    assert found["about"] == "training"
    assert "LossExploding" in found["text"]
    assert "optim.lr" in found["fix"]
    assert "moe_ray.telemetry.notify" not in done.stderr


def test_storage_that_cannot_be_used_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = check_storage(str(tmp_path / "file"))
    assert (found.about, found.level) == ("storage", "problem")
    (found,) = check_storage("ftp://somewhere")
    assert (found.level, "s3://" in found.fix) == ("problem", True)
    (found,) = check_storage(str(tmp_path / "new"))
    assert found.level in ("ok", "warning")
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def test_ports_and_limits_and_packages():
    assert {finding.level for finding in check_packages()} == {"ok"}
    assert len(list(check_ports())) == 3
    assert {finding.about for finding in check_limits()} == {"open files", "shared memory"}


def test_a_port_in_use_is_a_warning_unless_a_cluster_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr("jobs.checks._PORTS", {taken.getsockname()[1]: "Serve"})
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        (alone,) = check_ports()
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
        (beside,) = check_ports()
    assert (alone.level, beside.level, beside.fix) == ("warning", "ok", "")
    assert "in use, perhaps by the cluster 127.0.0.1:6379" in beside.text


def test_the_snippet_for_prometheus_names_what_is_there():
    (snippet,) = blocks("yaml")
    settings = yaml.safe_load(snippet)
    assert all(Path(file).is_file() for file in settings["rule_files"])
    (payload,) = blocks("json")
    assert json.loads(payload)["text"].startswith("[firing] DiskFull")
