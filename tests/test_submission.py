"""What a driver knows of its job, what it refuses to write, and what is uploaded for it."""

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from jobs.export import main as export
from jobs.report import make_report
from moe_ray.config import TelemetryConfig, build_config
from moe_ray.errors import ConfigError
from moe_ray.submission import Submission, read_submission, with_absolute_storage
from moe_ray.telemetry.logs import setup_logging
from tests.made_runs import metrics_line, write_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's job server starts a driver."""
    metadata = {"job_submission_id": "wiki-1", "job_name": "wiki-1", "team": "nlp"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {}, "metadata": metadata}))


def test_without_a_job_server_there_is_no_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert read_submission() is None
    config = with_absolute_storage(build_config({}, ["train.storage=runs"]))
    assert config.train.storage == str(Path("runs").resolve())


@pytest.mark.usefixtures("submitted")
def test_a_driver_knows_its_id_and_the_users_metadata(capfd: pytest.CaptureFixture[str]) -> None:
    assert read_submission() == Submission("wiki-1", {"team": "nlp"})
    ours = logging.getLogger("moe_ray")
    before = ours.handlers[:], ours.propagate, ours.level
    try:
        setup_logging(TelemetryConfig(log_format="json"), run="wiki")
        ours.warning("hello")
    finally:
        ours.handlers[:], ours.propagate = before[:2]
        ours.setLevel(before[2])
    line = json.loads(capfd.readouterr().err)
    assert (line["submission"], line["run"]) == ("wiki-1", "wiki")


@pytest.mark.usefixtures("submitted")
def test_a_job_does_not_write_into_its_working_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.storage='runs' is relative"):
        with_absolute_storage(build_config({}, ["train.storage=runs"]))
    with pytest.raises(ConfigError, match=r"data\.path='data' is relative"):
        with_absolute_storage(build_config({}, ["train.storage=/runs", "data.path=data"]))
    with pytest.raises(ConfigError, match="OUT_DIR='out' is relative"):
        export(str(tmp_path), "out", [])
    run = write_run(tmp_path / "run", [metrics_line(1)])
    with pytest.raises(ConfigError, match=r"out='page\.html' is relative"):
        make_report([str(run)], "page.html")


def test_a_job_gets_the_code_and_neither_runs_nor_environment(tmp_path: Path) -> None:
    """The tree as git has it, with what may lie in a checkout besides."""
    tree = tmp_path / "tree"
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    ).stdout.decode()
    extra = ["runs/wiki/metrics.jsonl", ".venv/bin/python", ".venv-vllm/x.py", ".git/HEAD", "build/sbom.json"]
    for name in [*names.strip("\0").split("\0"), *extra]:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes() if name not in extra else b"x")
    package = tmp_path / "package.zip"
    create_package(str(tree), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as file:
        found = set(file.namelist())
    assert {
        "jobs/train.py",
        "jobs/configs/quickstart.yaml",
        "moe_ray/native/decode.cpp",
        "cluster/node.sh",
    } <= found
    assert not found & set(extra)
    assert not [name for name in found if name.startswith(("tests/", "docs/"))]
    assert package.stat().st_size < 4_000_000


def test_follow_says_how_it_is_called() -> None:
    command = [sys.executable, "-m", "cluster.follow"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "SUBMISSION_ID" in done.stdout
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 2
    for id in ("", "..", "?a", "a/b"):
        wrong = subprocess.run([*command, id], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert wrong.returncode == 2
        assert wrong.stderr.startswith(f"error: {id!r} is no submission id.")
