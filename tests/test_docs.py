"""What the commands and snippets of the pages on architectures, routers, logs and lost workers do."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.chaos import parse as chaos_options
from moe_ray.config import build_config, load_config
from moe_ray.telemetry.run_log import read_metrics
from moe_ray.training.chaos.schedule import Fault, plan_faults
from moe_ray.tuning.check import check_sweep
from moe_ray.tuning.report.importance import FEWEST_TRIALS
from tests.tiny import copy_corpus, tiny_settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("architectures", "routers")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_snippet_prints_the_costs_of_a_model() -> None:
    (snippet,) = blocks("architectures", "python")
    output = subprocess.run([sys.executable, "-c", snippet], check=True, capture_output=True, text=True).stdout
    total, active, flops = map(int, output.split())
    assert total > active > 0
    assert flops > 6 * active / 2


def run_in(folder: Path, command: str) -> str:
    """Run a command of a page on a tiny model, with /data in `folder`; returns what it prints."""
    settings = tiny_settings(copy_corpus(folder / "wiki"), folder / "runs", "unused")
    settings["train"]["dtype"] = "bfloat16"
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    replacements = {
        "jobs/configs/small.yaml": "tiny.yaml",
        "jobs/configs/quickstart.yaml": "tiny.yaml",
        "jobs/configs/sweep.yaml": "tiny.yaml",
        "/data/": f"{folder}/",
        "python jobs/": f"python {ROOT}/jobs/",
    }
    for old, new in replacements.items():
        command = command.replace(old, new)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_train(page: str, tmp_path: Path) -> None:
    (tmp_path / "wiki").mkdir()
    (tmp_path / "cosine_router.py").write_text(blocks("routers", "python")[0])
    (command,) = blocks(page, "bash")
    run_in(tmp_path, command)
    (run_dir,) = (tmp_path / "runs").iterdir()
    metrics = read_metrics(run_dir)
    assert metrics[-1]["step"] == 12
    assert metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.cluster
@pytest.mark.slow
def test_commands_of_the_page_on_logs_log_and_track(tmp_path: Path) -> None:
    (tmp_path / "wiki").mkdir()
    logged, tracked = blocks("logging", "bash")
    assert '"logger": "moe_ray.training.events"' in run_in(tmp_path, logged)
    run_in(tmp_path, tracked)
    folder = tmp_path / "runs" / "tracked" / "trackers"
    assert {path.name for path in folder.iterdir()} == {"tensorboard", "mlflow.db", "wandb"}


def test_spaces_of_the_page_on_sweeps_are_possible() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert blocks("sweeps", "bash")[1].splitlines()[0] in readme
    first, space, population = (yaml.safe_load(block) for block in blocks("sweeps", "yaml"))
    for tree in (first, space, population):
        check_sweep(build_config(tree))
    check_sweep(load_config(ROOT / "jobs" / "configs" / "sweep.yaml"))
    shipped = (ROOT / "jobs" / "configs" / "first_sweep.yaml").read_text(encoding="utf-8")
    assert first == yaml.safe_load(shipped)
    assert first["sweep"]["trials"] == FEWEST_TRIALS, "the page tells the importance of settings"


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.exhaustive
def test_commands_of_the_page_on_sweeps(tmp_path: Path) -> None:
    (tmp_path / "wiki").mkdir()
    _, commands, _ = blocks("sweeps", "bash")
    sweep, train = commands.splitlines()
    space = "'sweep.space={optim.lr: {loguniform: [0.001, 0.01]}}' sweep.trials=2 sweep.scheduler=asha"
    assert "best trial: " in run_in(tmp_path, f"{sweep} {space} sweep.grace_steps=6")
    assert "step 12/12" in run_in(tmp_path, train)


def test_chaos_of_the_page_fits_its_run() -> None:
    chaos = shlex.split(blocks("fault-tolerance", "bash")[1])
    options = chaos_options(chaos[2:])
    config = load_config(ROOT / options.config, options.overrides)
    assert len(plan_faults([Fault(name) for name in options.faults.split(",")], 3, options.seed, config)) == 3


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_chaos_of_the_page_loses_nothing(tmp_path: Path) -> None:
    train, chaos = blocks("fault-tolerance", "bash")
    (tmp_path / "wiki").mkdir()
    assert "step 12/12" in run_in(tmp_path, train)
    # Faults need steps to fall between.
    output = run_in(tmp_path, f"{chaos.strip()} train.global_batch=24 train.log_every=1")
    assert "passed: 3 of 3 faults struck" in output
