"""Each command of the README is executed: here, by another test, or by CI."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cluster.head import Head, fetch, free_port
from cluster.local import LocalCluster
from tests.tiny import copy_corpus, tiny_settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "make quickstart": "tests/test_local_cluster.py, by its script",
    "make stop": "tests/test_local_cluster.py, by its module",
    "python -m cluster.local start": "tests/test_local_cluster.py",
    "python -m cluster.local status": "tests/test_local_cluster.py",
    "python -m cluster.local stop": "tests/test_local_cluster.py",
    "make check": ".ci/run",
    "make test": ".ci/run",
    "make bench": "by hand: it takes minutes and fails on no result",
    "source .venv/bin/activate": "is what runs the tests",
    "source runs/cluster/env": "tests/test_local_cluster.py, and set here",
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _commands() -> list[str]:
    return [line for block in _blocks("bash") for line in block.splitlines() if line]


HERE = [command for command in _commands() if command not in ELSEWHERE]


def test_no_command_is_forgotten() -> None:
    assert [command.split()[:2] for command in HERE] == [
        ["python", "jobs/prepare.py"],
        ["python", "jobs/train.py"],
        ["ray", "job"],
        ["python", "jobs/train.py"],
        ["python", "jobs/train.py"],
        ["python", "jobs/export.py"],
        ["python", "jobs/train.py"],
        ["python", "jobs/evaluate.py"],
        ["python", "jobs/watch.py"],
        ["python", "jobs/report.py"],
        ["python", "jobs/report.py"],
        ["serve", "run"],
        ["curl", "http://127.0.0.1:8000/v1/completions"],
    ]
    assert set(ELSEWHERE) <= set(_commands())


def test_make_knows_all_targets() -> None:
    targets = {word for command in _commands() if command.startswith("make ") for word in command.split()[1:]}
    targets |= set(re.findall(r"`make ([a-z-]+)`", README))
    subprocess.run(["make", "--dry-run", *sorted(targets)], cwd=ROOT, check=True, capture_output=True)


class Shell:
    """Runs the README's commands on a cluster of the test, on a tiny model and with /data in `folder`."""

    def __init__(self, folder: Path, cluster: LocalCluster, head: Head) -> None:
        (folder / "wiki").mkdir()
        settings = tiny_settings(copy_corpus(folder / "wiki"), folder / "runs", "unused")
        del settings["data"]["path"]
        (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
        self.port = free_port(8000)
        self._replacements = {
            "jobs/configs/quickstart.yaml": str(folder / "tiny.yaml"),
            "jobs/configs/small.yaml": str(folder / "tiny.yaml"),
            "/data/": f"{folder}/",
            "127.0.0.1:8000": f"127.0.0.1:{self.port}",
        }
        self._environment = os.environ | cluster.environment(head)
        self._environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start(self, command: str | list[str]) -> subprocess.Popen[str]:
        text = shlex.join(command) if isinstance(command, list) else command
        for old, new in self._replacements.items():
            text = text.replace(old, new)
        return subprocess.Popen(
            shlex.split(text),
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str | list[str]) -> str:
        process = self.start(command)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, f"{command}\n{output}"
        return output


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    """On a cluster that is stopped however the test ends."""
    cluster = LocalCluster(tmp_path / "cluster")
    try:
        yield Shell(tmp_path, cluster, cluster.start())
    finally:
        cluster.stop()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_in_their_order(shell: Shell) -> None:
    prepare, train, submit, show_help, train_olmoe, export, train_elastic, evaluate, *look, serve, curl = HERE
    assert "wiki" in shell.run(prepare)
    assert "step 12/12" in shell.run(train)
    assert "succeeded" in shell.run(submit), "the same run again has nothing left to do"
    assert "train.global_batch" in shell.run(show_help)
    assert "step 12/12" in shell.run(train_olmoe)
    assert "MixtralForCausalLM" in shell.run(export)
    assert "step 12/12" in shell.run(train_elastic)
    assert "unigram model" in shell.run(evaluate)
    watch, report, compare = look
    assert "step 12/12" in shell.run(watch)
    assert "runs/wiki/report.html" in shell.run(report)
    assert "runs/both.html" in shell.run(compare)
    # `serve run` takes port 8000 unless Serve already has another.
    shell.run(["serve", "start", "--http-port", str(shell.port)])
    server = shell.start(serve)
    try:
        _await_ready(shell.port)
        assert '"text_completion"' in shell.run(curl)
        (snippet,) = _blocks("python")
        assert shell.run([sys.executable, "-c", snippet])
    finally:
        server.terminate()
        server.communicate(timeout=60)


def _await_ready(port: int) -> None:
    deadline = time.monotonic() + 240
    while True:
        try:
            fetch(f"http://127.0.0.1:{port}/readyz", "")
            return
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.5)
