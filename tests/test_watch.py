"""Real training, watched as by its training command: each fault raises its own alert, which resolves."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moe_ray.config import Config, build_config, load_config
from moe_ray.data.prepare import prepare
from moe_ray.parallel.mesh import build_mesh
from moe_ray.storage import open_storage
from moe_ray.telemetry.alerts import Alert
from moe_ray.telemetry.health import Status
from moe_ray.telemetry.notify import WEBHOOK_VARIABLE
from moe_ray.telemetry.run_log import read_events, read_metrics
from moe_ray.telemetry.watcher import Watcher, training_watcher, watch_training
from moe_ray.training.loop import train
from tests.damage import Disk
from tests.tiny import copy_corpus, rank_main, tiny_settings
from tests.waiting import until
from tests.worlds import kill_world, start_world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


class Watch:
    """A watched run and what was told: rule, state and step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.told: list[tuple[str, str, int]] = []
        self.alerts: list[Alert] = []
        self.step = 0
        self.watcher: Watcher = training_watcher(open_storage(config.train.run_uri), config, [self._note])

    def _note(self, alert: Alert) -> None:
        # What else runs on this machine is not of the run.
        if alert.rule.component != "host":
            self.told.append((alert.rule.name, str(alert.state), self.step))
            self.alerts.append(alert)

    def __call__(self, metrics: dict[str, Any]) -> None:
        self.step = metrics["step"]
        self.watcher.round(time.time())

    def train(self) -> None:
        train(self.config, build_mesh(1), prepare(self.config), self)
        self.watcher.round(time.time())

    def rules(self, state: str) -> list[str]:
        return [rule for rule, told, _ in self.told if told == state]


def collapses(corpus: Path, storage: Path, weight: float) -> Config:
    settings = ["train.steps=60", "train.log_every=10", "train.eval_every=60", "optim.lr=2e-2"]
    settings += ["model.num_experts=8", f"model.load_balancing_loss_weight={weight}"]
    return build_config(tiny_settings(corpus, storage, f"weight-{weight}"), settings)


def check_flagged(watch: Watch) -> None:
    rule, state, step = watch.told[0]
    assert (rule, state) == ("ExpertCollapse", "firing")
    assert step <= 50
    assert "model.load_balancing_loss_weight" in watch.alerts[0].rule.action
    assert watch.watcher.health.of("experts") is Status.UNHEALTHY


def test_collapse_is_flagged_within_50_steps_and_a_healthy_run_raises_nothing(corpus, tmp_path):
    collapsing, healthy = (Watch(collapses(corpus, tmp_path, weight)) for weight in (0.0, 0.03))
    collapsing.train()
    healthy.train()
    check_flagged(collapsing)
    assert healthy.told == []


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_quickstart_raises_nothing_and_without_its_auxiliary_loss_is_flagged(tmp_path, seed):
    settings = [f"train.storage={tmp_path}", f"data.path={tmp_path / 'data'}", "checkpoint.every=1000"]
    settings += ["parallel.workers=1", "parallel.ep=1", f"train.seed={seed}"]
    off = ["train.name=unbalanced", "train.steps=50", "model.load_balancing_loss_weight=0"]
    collapsing = Watch(load_config("jobs/configs/quickstart.yaml", [*settings, *off]))
    healthy = Watch(load_config("jobs/configs/quickstart.yaml", settings))
    collapsing.train()
    healthy.train()
    check_flagged(collapsing)
    assert healthy.told == []


def test_a_full_disk(corpus, small_disk):
    disk = Disk(small_disk)
    settings = ["train.steps=16", "checkpoint.every=2", "checkpoint.max_failures=9", "checkpoint.retry_seconds=0"]
    watch = Watch(build_config(tiny_settings(corpus, small_disk, "run"), settings))

    def report(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 3:
            disk.fill()
        watch(metrics)
        if metrics["failed_checkpoints"]:
            disk.free()

    train(watch.config, build_mesh(1), prepare(watch.config), report)
    watch.watcher.round(time.time())
    assert watch.rules("firing") == ["DiskFull", "CheckpointFailing"]
    assert sorted(watch.rules("resolved")) == ["CheckpointFailing", "DiskFull"]


def test_an_exploding_loss(corpus, tmp_path):
    watch = Watch(build_config(tiny_settings(corpus, tmp_path, "run"), []))

    def go_on(steps: int, *settings: str) -> None:
        tree = tiny_settings(corpus, tmp_path, "run")
        watch.config = build_config(tree, [f"train.steps={steps}", "optim.clip_norm=100", *settings])
        watch.train()

    def told(state: str) -> list[str]:
        # Such steps also ruin the router.
        return [rule for rule in watch.rules(state) if rule != "ExpertCollapse"]

    go_on(20)
    assert watch.told == []
    go_on(60, "optim.lr=3.0", "train.max_bad_steps=1000")
    assert told("firing") == ["LossExploding"]
    assert told("resolved") == []
    # What the alert recommends.
    for checkpoint in (watch.config.train.run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > 20:
            shutil.rmtree(checkpoint)
    go_on(24)
    assert told("firing") == told("resolved") == ["LossExploding"]
    assert not watch.watcher.alerts.active()


@pytest.mark.slow
def test_a_stalled_worker(corpus, tmp_path):
    config = build_config(
        tiny_settings(corpus, tmp_path, "run"), ["train.steps=100000", "train.eval_every=100000"]
    )
    data_dir = prepare(config)
    config.train.run_dir.mkdir(parents=True)
    watch = Watch(config)
    world = start_world(1, rank_main, config, data_dir)

    def told(*expected: tuple[str, str]) -> bool:
        watch.watcher.round(time.time())
        return [each[:2] for each in watch.told] == list(expected)

    try:
        until(lambda: read_metrics(config.train.run_dir), seconds=60)
        assert told()
        os.kill(world[0].pid or 0, signal.SIGSTOP)
        until(lambda: told(("TrainingStalled", "firing")), seconds=120)
        os.kill(world[0].pid or 0, signal.SIGCONT)
        until(lambda: told(("TrainingStalled", "firing"), ("TrainingStalled", "resolved")), seconds=60)
    finally:
        kill_world(world)


def test_alerts_become_events_of_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.delenv(WEBHOOK_VARIABLE, raising=False)
    config = collapses(corpus, tmp_path, 0.0)
    run = open_storage(config.train.run_uri)
    with watch_training(run, config):
        train(config, build_mesh(1), prepare(config), lambda metrics: None)
    events = [event for event in read_events(run) if event.get("component") == "experts"]
    assert [event["event"] for event in events][:1] == ["alert"]
    assert events[0]["alert"] == "ExpertCollapse"
    assert events[0]["labels"] == {"run": config.train.name}
    off = config.model_copy(update={"telemetry": config.telemetry.model_copy(update={"alerts": False})})
    with watch_training(run, off):
        assert not any(thread.name == "watch-training" for thread in threading.enumerate())


def test_a_resumed_run_is_watched_from_now_on(corpus, tmp_path):
    config = collapses(corpus, tmp_path, 0.0)
    Watch(config).train()
    later = Watch(config)
    later.watcher.round(time.time())
    assert later.told == []


def test_storage_that_takes_no_file(corpus, tmp_path):
    config = build_config(tiny_settings(corpus, tmp_path, "run"))
    config.train.run_dir.write_text("in the way")
    watch, now = Watch(config), time.time()
    for seconds in (0, 21):
        watch.watcher.round(now + seconds)
    assert ("StorageUnreachable", "firing") in [told[:2] for told in watch.told]
    config.train.run_dir.unlink()
    watch.watcher.round(now + 22)
    assert ("StorageUnreachable", "resolved") in [told[:2] for told in watch.told]
