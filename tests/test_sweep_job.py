"""`jobs/sweep.py` on a real Ray cluster: trials that end early, fail or cannot be; kills; populations."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from moe_ray.checkpoint.catalog import list_steps
from moe_ray.config import load_config
from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import read_events, read_metrics
from moe_ray.tuning.space import draw
from moe_ray.tuning.trials import Trial, read_trials
from tests.conftest import RayCluster
from tests.multi_node import train_workers
from tests.tiny import copy_corpus, tiny_settings
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
SPACE = {"optim.lr": {"loguniform": [1e-3, 1e-2]}, "optim.weight_decay": {"choice": [0.0, 0.1]}}


class Sweep:
    """A sweep of a tiny model, as a subprocess, and its folder."""

    def __init__(self, cluster: RayCluster, folder: Path, name: str, **settings: Any) -> None:
        corpus = folder / "corpus"
        if not corpus.is_dir():
            corpus.mkdir()
            copy_corpus(corpus)
        tree = tiny_settings(corpus, folder, name)
        tree["train"] |= {"eval_every": 3, "eval_batches": 1}
        tree["sweep"] = {"space": SPACE, "trials": 4, "concurrent": 2} | settings
        self.folder = folder / name
        self.config = folder / f"{name}.yaml"
        self.config.write_text(yaml.safe_dump(tree))
        self._environment = os.environ | {"RAY_ADDRESS": cluster.address}

    def start(self, *overrides: str, job: str = "sweep", config: Path | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, f"jobs/{job}.py", str(config or self.config), *overrides]
        return subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *overrides: str, **options: Any) -> tuple[int, str]:
        process = self.start(*overrides, **options)
        try:
            output, _ = process.communicate(timeout=600)
        finally:
            process.kill()
        return process.returncode, output

    def trials(self) -> list[Trial]:
        return read_trials(open_storage(self.folder))


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()
    psutil.wait_procs(train_workers(), timeout=60)


def test_trials_are_stopped_retried_excluded_and_the_best_trains(ray_cluster: RayCluster, tmp_path: Path) -> None:
    first = [
        {"optim.lr": 5e-3},
        {"optim.lr": 1e-4},
        {"optim.lr": 1e30},
        {"model.top_k": 4, "model.num_experts": 2},
    ]
    space = {
        "optim.lr": {"loguniform": [1e-5, 1e30]},
        "model.num_experts": {"choice": [2, 4]},
        "model.top_k": {"choice": [2, 4]},
    }
    sweep = Sweep(
        ray_cluster, tmp_path, "asha", space=space, first=first, scheduler="asha", grace_steps=3, concurrent=1
    )
    code, output = sweep.run("train.max_bad_steps=1")
    assert code == 0, output
    best, stopped, failed, infeasible = sweep.trials()
    assert (best.status, best.steps, best.attempts) == ("finished", 12, 1)
    assert [step for step, _ in best.history] == [3, 6, 9, 12]
    assert (stopped.status, stopped.steps) == ("stopped", 3)
    assert list_steps(open_storage(sweep.folder / stopped.run))
    assert (failed.status, failed.attempts) == ("failed", 2)
    assert "not finite" in (failed.reason or "")
    assert (infeasible.status, infeasible.attempts) == ("infeasible", 0)
    assert "model.top_k=4 is more than model.num_experts=2" in (infeasible.reason or "")
    assert f"best trial: 0, val_loss {best.metrics['val_loss']:.4f}" in output
    assert (sweep.folder / "sweep.html").is_file()

    code, output = sweep.run("train.max_bad_steps=2")
    assert code == 2
    assert "train.max_bad_steps=2 differs from the sweep" in output

    code, output = sweep.run(job="train", config=sweep.folder / "best.yaml")
    assert code == 0, output
    losses = [
        [metrics["loss"] for metrics in read_metrics(run)]
        for run in (tmp_path / "asha-best", sweep.folder / best.run)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.exhaustive
def test_killed_sweep_goes_on(
    ray_cluster: RayCluster, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    sweep = Sweep(ray_cluster, tmp_path, "killed", trials=3)
    started.append(sweep.start("checkpoint.every=1", "train.steps=40", "train.log_every=3"))

    def one_has_ended_and_one_has_saved() -> bool:
        assert started[0].poll() is None, started[0].communicate()[0]
        status = {trial.status: trial for trial in sweep.trials()}
        running = status.get("running")
        return "finished" in status and running is not None and running.steps > 3

    until(one_has_ended_and_one_has_saved, 400)
    started[0].kill()
    started[0].communicate()
    psutil.wait_procs(train_workers(), timeout=60)
    before = sweep.trials()
    code, output = sweep.run("checkpoint.every=1", "train.steps=40", "train.log_every=3")
    assert code == 0, output
    after = sweep.trials()
    for then, now in zip(before, after, strict=False):
        if then.status == "finished":
            assert now == then
        else:
            last = read_metrics(sweep.folder / now.run)[-1]
            assert last["resumed_step"] >= 3
            assert [step for step, _ in now.history] == [*range(3, 40, 3), 40]
    assert [trial.status for trial in after] == ["finished"] * 3
    code, output = sweep.run("checkpoint.every=1", "train.steps=40", "train.log_every=3")
    assert code == 0, output
    assert sweep.trials() == after
    config = load_config(sweep.config)
    assert [trial.values for trial in after] == [draw(config, number) for number in range(3)]


@pytest.mark.exhaustive
def test_killed_worker_and_sigterm_cost_no_trial(
    ray_cluster: RayCluster, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    sweep = Sweep(ray_cluster, tmp_path, "signals", trials=2, concurrent=1)
    overrides = (
        "checkpoint.every=2",
        "train.steps=60",
        "train.log_every=2",
        "parallel.workers=2",
        "parallel.ep=2",
    )
    started.append(sweep.start(*overrides))

    def has_steps(number: int, steps: int) -> bool:
        assert started[0].poll() is None, started[0].communicate()[0]
        trials = sweep.trials()
        return len(trials) > number and trials[number].steps >= steps

    until(lambda: has_steps(0, 4), 300)
    train_workers()[0].send_signal(signal.SIGKILL)
    until(lambda: has_steps(1, 4), 400)
    started[0].send_signal(signal.SIGTERM)
    output, _ = started[0].communicate(timeout=300)
    assert started[0].returncode == 1
    assert "a signal ended the sweep" in output
    assert not train_workers()
    finished, saved = sweep.trials()
    assert (finished.status, finished.attempts, finished.steps) == ("finished", 1, 60)
    assert "failure" in [event["event"] for event in read_events(sweep.folder / finished.run)]
    assert saved.status == "pending"
    steps = list_steps(open_storage(sweep.folder / saved.run))
    assert steps[-1] >= saved.steps
    code, output = sweep.run(*overrides)
    assert code == 0, output
    assert [trial.status for trial in sweep.trials()] == ["finished"] * 2
    resumed = read_metrics(sweep.folder / saved.run)[-1]
    assert resumed["resumed_step"] >= steps[-1]


@pytest.mark.exhaustive
def test_population_takes_over_the_better_and_goes_on_after_a_kill(
    ray_cluster: RayCluster, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    space = {
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
        "model.load_balancing_loss_weight": {"loguniform": [1e-3, 1e-1]},
    }
    sweep = Sweep(
        ray_cluster,
        tmp_path,
        "pbt",
        space=space,
        scheduler="pbt",
        perturb_steps=6,
        trials=3,
        concurrent=3,
        first=[{"optim.lr": 1e-2}, {"optim.lr": 5e-3}, {"optim.lr": 1e-4}],
    )
    started.append(sweep.start())
    changes = sweep.folder / "changes.jsonl"

    def has_changed() -> bool:
        assert started[0].poll() is None, started[0].communicate()[0]
        return changes.is_file()

    until(has_changed, 400)
    started[0].kill()
    started[0].communicate()
    psutil.wait_procs(train_workers(), timeout=60)
    written = changes.read_text()
    code, output = sweep.run()
    assert code == 0, output
    assert changes.read_text() == written
    (change,) = map(json.loads, written.splitlines())
    assert (change["step"], change["number"]) == (6, 2)
    assert change["before"]["optim.lr"] == 1e-4
    assert change["values"]["optim.lr"] > 1e-4
    trials = sweep.trials()
    assert [trial.status for trial in trials] == ["finished"] * 3
    assert trials[2].run == change["run"]
    assert trials[2].values == change["values"]
    steps = [[metrics["step"] for metrics in read_metrics(sweep.folder / trial.run)] for trial in trials]
    assert steps == [list(range(1, 13))] * 3
    (exploit,) = [event for event in read_events(sweep.folder / change["run"]) if event["event"] == "exploit"]
    assert exploit["source"] == change["source"]
    metrics = read_metrics(sweep.folder / change["run"])
    source = read_metrics(sweep.folder / f"trial-{change['source']:03d}")
    assert [line["loss"] for line in metrics[:6]] == [line["loss"] for line in source[:6]]
    assert metrics[6]["resumed_step"] == 6
    # The schedule is that of all steps, the peak the changed one.
    ratio = metrics[6]["lr"] / source[6]["lr"]
    assert ratio == pytest.approx(change["values"]["optim.lr"] / trials[change["source"]].values["optim.lr"])
