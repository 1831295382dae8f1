"""The training loop in real processes: it learns, reports, resumes after SIGKILL, and survives storage trouble."""

import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_ray.checkpoint.catalog import list_checkpoints, read_manifest
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import Config, build_config, load_config
from moe_ray.data.prepare import prepare
from moe_ray.errors import ConfigError, StorageError, TrainingError
from moe_ray.parallel.mesh import build_mesh
from moe_ray.telemetry.records import is_number
from moe_ray.telemetry.run_log import read_metrics
from moe_ray.telemetry.samples import EVALUATED, RECORDED
from moe_ray.training.loop import train
from tests.tiny import copy_corpus, rank_main, run, tiny_settings
from tests.worlds import kill_world, start_world


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def make_config(corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(*overrides: str, name: str = "run", storage: Path = tmp_path) -> Config:
        return build_config(tiny_settings(corpus, storage, name), overrides)

    return make


def run_and_kill(config: Config, is_time: Callable[[], bool]) -> None:
    """Train until `is_time`, then SIGKILL every rank."""
    data_dir = prepare(config)
    config.train.run_dir.mkdir(parents=True, exist_ok=True)
    world = start_world(config.parallel.max_workers, rank_main, config, data_dir)
    try:
        while not is_time():
            assert all(process.is_alive() for process in world), "the run ended before it could be killed"
            time.sleep(0.0005)
    finally:
        kill_world(world)


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    return [m["loss"] for m in metrics]


def test_metrics_say_what_happened(make_config: Callable[..., Config]) -> None:
    metrics = run(make_config("parallel.workers=2", "parallel.ep=2", "train.steps=60", "train.eval_every=30"))
    first, last = metrics[0], metrics[-1]
    assert first["loss"] == pytest.approx(math.log(512), rel=0.05)
    assert last["loss"] < first["loss"] - 0.7
    assert metrics[29]["val_perplexity"] > last["val_perplexity"]
    assert last["val_perplexity"] == pytest.approx(math.exp(last["val_loss"]))
    assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))
    assert last["tokens"] == 60 * 6 * 32
    assert last["tokens_per_second"] == pytest.approx(6 * 32 / last["step_seconds"])
    phases = [last[f"{p}_seconds"] for p in ("data", "forward", "dispatch", "backward", "reduce", "optimizer")]
    assert all(seconds > 0 for seconds in phases)
    assert sum(phases) <= last["step_seconds"] * 1.01
    for load_E, cv, variance in zip(
        last["load_by_layer"], last["load_cv_by_layer"], last["load_variance_by_layer"], strict=True
    ):
        assert sum(load_E) == pytest.approx(1)
        assert variance == pytest.approx(sum((f - 0.25) ** 2 for f in load_E) / 4)
        assert cv == pytest.approx(math.sqrt(variance) / 0.25)
    assert last["load_cv"] == max(last["load_cv_by_layer"])
    assert 0 < last["routing_entropy"] <= 1
    assert last["dead_experts"] == sum(f == 0 for load_E in last["load_by_layer"] for f in load_E)
    assert last["overloaded_experts"] == sum(f > 0.5 for load_E in last["load_by_layer"] for f in load_E)
    assert last["load_max_over_mean"] == pytest.approx(4 * max(map(max, last["load_by_layer"])))
    assert 0.25 < last["router_confidence"] < 1
    assert 0 < last["router_margin"] < last["router_confidence"]
    assert last["grad_norm"] > 0
    assert last["memory_bytes"] > 50e6
    assert last["val_perplexity_by_domain"]["code"] == pytest.approx(last["val_perplexity"])
    of_first, of_last = ({name for name in record if is_number(record[name])} for record in (first, last))
    assert (of_last, of_last - of_first) == (RECORDED, EVALUATED)


def test_world_size_does_not_change_the_curve(make_config: Callable[..., Config]) -> None:
    one = run(make_config(name="one"))
    four = run(make_config("parallel.workers=4", "parallel.ep=2", name="four"))
    assert losses(four) == pytest.approx(losses(one), rel=1e-5)
    assert four[-1]["val_loss"] == pytest.approx(one[-1]["val_loss"], rel=1e-5)
    for name in ("router_confidence", "router_margin", "load_max_over_mean"):
        assert four[-1][name] == pytest.approx(one[-1][name], rel=1e-3), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_killed_run_resumes_on_the_undisturbed_curve(make_config: Callable[..., Config], dtype: str) -> None:
    settings = ["parallel.workers=2", "parallel.ep=2", f"train.dtype={dtype}"]
    undisturbed = run(make_config(*settings, name="undisturbed"))
    config = make_config(*settings, name="killed")
    run_and_kill(config, lambda: len(read_metrics(config.train.run_dir)) >= 6)
    assert [read_manifest(path).step for path in list_checkpoints(config.train.run_dir)] == [4]
    assert losses(run(config)) == pytest.approx(losses(undisturbed), rel=1e-6)


def test_resume_on_another_world(make_config: Callable[..., Config]) -> None:
    undisturbed = run(make_config(name="undisturbed"))
    config = make_config("parallel.workers=4", "parallel.ep=4", name="moved")
    run_and_kill(config, lambda: len(read_metrics(config.train.run_dir)) >= 6)
    moved = make_config("parallel.workers=2", "parallel.ep=1", name="moved")
    assert losses(run(moved)) == pytest.approx(losses(undisturbed), rel=1e-5)


def test_killed_while_saving_uses_the_previous_checkpoint(make_config: Callable[..., Config]) -> None:
    undisturbed = run(make_config("checkpoint.every=1", name="undisturbed"))
    config = make_config("checkpoint.every=1", name="killed")
    checkpoints = config.train.run_dir / "checkpoints"

    def half_written() -> bool:
        begun = {path.parent for path in checkpoints.glob("step-*/model-*")}
        whole = list_checkpoints(config.train.run_dir)
        return len(whole) >= 2 and len(begun) > len(whole)

    run_and_kill(config, half_written)
    whole = [read_manifest(path).step for path in list_checkpoints(config.train.run_dir)]
    assert losses(run(config)) == pytest.approx(losses(undisturbed), rel=1e-6)
    assert whole
    assert sorted(checkpoints.iterdir()) == list_checkpoints(config.train.run_dir)
    assert not list(checkpoints.glob("*/.tmp*"))


def test_only_the_newest_checkpoints_are_kept(make_config: Callable[..., Config]) -> None:
    config = make_config("checkpoint.every=2", "checkpoint.keep_last=2")
    run(config)
    assert [path.name for path in list_checkpoints(config.train.run_dir)] == ["step-00000010", "step-00000012"]


def test_full_disk_loses_nothing(make_config: Callable[..., Config], small_disk: Path) -> None:
    config = make_config("checkpoint.every=1", "checkpoint.keep_last=9", storage=small_disk)
    data_dir = prepare(config)
    config.train.run_dir.mkdir()
    with pytest.raises(StorageError, match=r"No space left.*Fix: free space"):
        train(config, build_mesh(1), data_dir, lambda metrics: None)
    kept = list_checkpoints(config.train.run_dir)
    assert kept
    assert [path.name for path in kept[0].parent.iterdir() if path.name.startswith(".")] == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert len(losses(run(config))) == 12


def test_unfinished_last_line_of_the_metrics_is_dropped(make_config: Callable[..., Config]) -> None:
    config = make_config("train.steps=4")
    run(config)
    path = config.train.run_dir / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    longer = make_config("train.steps=6")
    assert len(losses(run(longer))) == 6
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_damaged_metrics_do_not_stop_a_run(make_config: Callable[..., Config]) -> None:
    config = make_config("train.steps=4")
    run(config)
    path = config.train.run_dir / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"xx\n\x00\xff\n[1]\n{}\n")
    assert len(losses(run(make_config("train.steps=6")))) == 6


def test_damaged_checkpoints_do_not_push_out_good_ones(make_config: Callable[..., Config]) -> None:
    config = make_config("checkpoint.keep_last=3")
    undisturbed = losses(run(config))
    for checkpoint in list_checkpoints(config.train.run_dir)[1:]:
        flip_a_byte(next(checkpoint.glob("model-*")))
    config = make_config("checkpoint.keep_last=1")
    run_and_kill(
        config, lambda: any(m["step"] >= 10 and m["resumed_step"] == 4 for m in read_metrics(config.train.run_dir))
    )
    assert [read_manifest(path).step for path in list_checkpoints(config.train.run_dir)] == [8]
    assert losses(run(config)) == pytest.approx(undisturbed, rel=1e-6)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_steps_that_are_not_finite_are_skipped_and_too_many_stop_the_run(
    make_config: Callable[..., Config],
) -> None:
    settings = ("optim.lr=1e6", "optim.clip_norm=1e9", "checkpoint.every=1", "checkpoint.keep_last=1")
    config = make_config(*settings, "train.max_bad_steps=3")
    data_dir = prepare(config)
    with pytest.raises(TrainingError, match=r"3 steps in a row.*\(sequences \d+ to \d+\)") as raised:
        train(config, build_mesh(1), data_dir, lambda metrics: None)
    metrics = read_metrics(config.train.run_dir)
    skipped = [m["step"] for m in metrics if m["skipped_steps"]]
    last = int(re.search(r"the last step (\d+) \(sequences", str(raised.value))[1])
    assert skipped[-3:] == [last - 2, last - 1, last]
    assert all(m["loss"] is None and m["grad_norm"] is None for m in metrics if m["skipped_steps"])
    (checkpoint,) = list_checkpoints(config.train.run_dir)
    weights = load_for_inference(checkpoint).model.state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_without_the_load_balancing_loss_the_load_collapses(tmp_path: Path) -> None:
    """On the corpus and with the model of the quickstart."""
    settings = ["train.steps=260", "train.eval_every=260", "train.log_every=20", "train.micro_batch=16"]
    settings += ["parallel.workers=1", "parallel.ep=1", f"train.storage={tmp_path}", f"data.path={tmp_path}/data"]
    last = {}
    for name, weight in (("balanced", 0.03), ("collapsed", 0.0)):
        overrides = [*settings, f"train.name={name}", f"model.load_balancing_loss_weight={weight}"]
        last[name] = run(load_config("jobs/configs/quickstart.yaml", overrides))[-1]
    assert last["balanced"]["load_cv"] < 0.3
    assert last["balanced"]["load_variance"] < 0.1
    assert last["collapsed"]["load_cv"] > 1.0


def test_metrics_that_are_not_finite_are_null(make_config: Callable[..., Config]) -> None:
    config = make_config("optim.lr=1e18", "optim.warmup_steps=0", "train.eval_every=1", "train.max_bad_steps=2")
    data_dir = prepare(config)
    with pytest.raises(TrainingError, match="2 steps in a row"):
        train(config, build_mesh(1), data_dir, lambda metrics: None)
    metrics = read_metrics(config.train.run_dir)
    assert [m["skipped_steps"] for m in metrics][-2:] == [1, 1]
    assert metrics[-1]["loss"] is None


def test_a_job_that_lost_the_run_changes_nothing(make_config: Callable[..., Config]) -> None:
    config = make_config("train.steps=4")
    run(config)
    folder = config.train.run_dir
    (folder / "checkpoints/step-00000008").mkdir()
    (folder / "checkpoints/step-00000008/half").write_text("of its successor")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    longer = make_config("train.steps=8")
    with pytest.raises(ConfigError, match="is trained by another job"):
        train(longer, build_mesh(1), prepare(longer), lambda metrics: None, lambda: False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_start_that_wakes_up_beside_its_successor_publishes_nothing(make_config: Callable[..., Config]) -> None:
    config = make_config("train.steps=6", "checkpoint.every=2", "checkpoint.keep_last=1")
    data_dir = prepare(config)
    successors: list[list[float]] = []

    def is_ours() -> bool:
        """Asked when step 2 is to be published: by then another start has trained the run to its end."""
        if not successors and (config.train.run_dir / "checkpoints/step-00000002").exists():
            successors.append(losses(run(config)))
        return True

    with pytest.raises(ConfigError, match="by a later start of this one"):
        train(config, build_mesh(1), data_dir, lambda metrics: None, is_ours)
    (checkpoint,) = list_checkpoints(config.train.run_dir)
    assert load_for_inference(checkpoint).step == 6
