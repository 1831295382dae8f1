"""What a sweep decides from its trials, without a cluster: rungs, populations, forks, the board, the table."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from moe_ray.checkpoint.catalog import is_whole, list_steps, read_step
from moe_ray.checkpoint.fork import fork
from moe_ray.config import Config, build_config, to_yaml
from moe_ray.errors import CheckpointError, ConfigError, DataError
from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import METRICS, RUN_SETTINGS, SWEEP_SETTINGS, read_metrics
from moe_ray.training.launcher import run_training
from moe_ray.tuning.board import Board
from moe_ray.tuning.changes import CHANGES, read_changes, write_changes
from moe_ray.tuning.outcome import BEST, write_outcome
from moe_ray.tuning.population import perturb, plan
from moe_ray.tuning.report.build import SWEEP_PAGE
from moe_ray.tuning.sweep import run_sweep, sweep_samples
from moe_ray.tuning.table import Table
from moe_ray.tuning.trials import Trial, read_trials, write_trials
from moe_ray.tuning.tuner import asha
from tests.lives import live, tiny_trainer

SPACE = {"optim.lr": {"loguniform": [1e-3, 1e-1]}, "optim.beta1": {"choice": [0.7, 0.8, 0.9]}}


def sweep_of(**settings: Any) -> Config:
    return build_config(
        {"train": {"name": "s", "steps": 27}, "optim": {"warmup_steps": 2}, "sweep": {"space": SPACE, **settings}}
    )


def losses(*pairs: tuple[int, float]) -> list[dict[str, Any]]:
    return [{"step": step, "val_loss": loss, "load_cv": 0.1} for step, loss in pairs]


def decide(scheduler: Any, name: str, records: list[dict[str, Any]]) -> list[str]:
    trial: Any = SimpleNamespace(trial_id=name)
    scheduler.on_trial_add(None, trial)
    return [scheduler.on_trial_result(None, trial, {"records": [record]}) for record in records]


def test_rungs_hold_what_trials_of_an_earlier_start_reached() -> None:
    config = sweep_of(scheduler="asha", grace_steps=3, reduction_factor=3)
    ended = {0: losses((3, 4.0), (9, 3.0), (27, 2.0)), 1: losses((3, 5.0)), 2: losses((3, 4.5))}
    scheduler = asha(config, ended)
    assert decide(scheduler, "good", losses((1, 9.0), (3, 3.9), (9, 2.9), (27, 1.9))) == ["CONTINUE"] * 4
    assert decide(scheduler, "late", losses((3, 3.8), (6, 9.0), (9, 3.5))) == ["CONTINUE", "CONTINUE", "STOP"]
    assert decide(scheduler, "bad", losses((2, 9.0), (3, 4.4))) == ["CONTINUE", "STOP"]
    assert decide(asha(config, {}), "first", losses((3, 99.0))) == ["CONTINUE"]


def test_rungs_count_bounds_first() -> None:
    config = sweep_of(scheduler="asha", grace_steps=3, reduction_factor=3, constraints=["load_cv <= 0.2"])
    scheduler = asha(config, {0: losses((3, 4.0))})
    wild = [{"step": 3, "val_loss": 1.0, "load_cv": 0.9}]
    assert decide(scheduler, "wild", wild) == ["STOP"]


def population(count: int = 8) -> list[Trial]:
    values = {"optim.lr": 1e-2, "optim.beta1": 0.8}
    return [
        Trial(number, f"trial-{number:03d}", values, "pending", steps=9, metrics={"val_loss": 5.0 - number})
        for number in range(count)
    ]


def test_the_worst_take_over_the_best_and_the_plan_is_the_same_each_time() -> None:
    config = sweep_of(scheduler="pbt", perturb_steps=9)
    trials = [*population(), Trial(8, "trial-008", {}, "failed", metrics={"val_loss": 0.0})]
    changes = plan(config, trials, 9)
    assert changes == plan(config, reversed(trials), 9)
    assert changes != plan(config, trials, 18)
    assert [change.number for change in changes] == [1, 0]
    assert {change.source for change in changes} <= {6, 7}
    assert [change.run for change in changes] == ["trial-001-from-9", "trial-000-from-9"]
    assert plan(config, population(1), 9) == []


def test_changes_stay_in_the_space_and_leave_out_what_must_not_change() -> None:
    config = sweep_of(scheduler="pbt", perturb_steps=9, resample_probability=0.0)
    generator = random.Random(0)
    near = [perturb(config, {"optim.lr": 0.09, "optim.beta1": 0.9}, generator) for _ in range(50)]
    assert {values["optim.lr"] for values in near} == {0.09 * 0.8, 0.1}
    assert {values["optim.beta1"] for values in near} == {0.8, 0.9}
    # A first trial may have a configured value that is null.
    assert 1e-3 <= perturb(config, {"optim.lr": None}, generator)["optim.lr"] <= 1e-1
    drawn = perturb(sweep_of(scheduler="pbt", resample_probability=1.0, mutate=["optim.lr"]), near[0], generator)
    assert drawn["optim.lr"] not in (0.09 * 0.8, 0.1)
    assert drawn["optim.beta1"] == near[0]["optim.beta1"]


def test_a_fork_has_the_state_and_the_past_of_its_source(tmp_path: Path) -> None:
    source, target = open_storage(tmp_path / "a"), open_storage(tmp_path / "b")
    trainer = tiny_trainer()
    live(trainer, source, [4, 8], extra=b"")
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 11)]
    source.write(METRICS, "".join(line + "\n" for line in lines).encode())
    changed = trainer.config.model_copy(update={"train": trainer.config.train.model_copy(update={"name": "b"})})
    fork(source, 4, target, changed)
    assert list_steps(target) == [4]
    manifest = read_step(target, 4)
    assert is_whole(target, manifest)
    assert manifest.files == read_step(source, 4).files
    assert manifest.config["train"]["name"] == "b"
    assert [metrics["step"] for metrics in read_metrics(target)] == [1, 2, 3, 4]
    damaged = tmp_path / "a" / "checkpoints" / "step-00000008" / manifest.files[0].name
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="is damaged"):
        fork(source, 8, open_storage(tmp_path / "c"), changed)
    assert list_steps(open_storage(tmp_path / "c")) == []


def test_the_board_keeps_what_was_done_again_once(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    board = Board(sweep_of(), storage)
    board.put(Trial(0, "trial-000", {}, "running"))
    board.log(0, losses((3, 5.0), (6, 4.0)), seconds=2.0)
    board.log(0, [{"step": 3, "val_loss": 5.0, "load_by_layer": [[1.0]], "tokens": None}], seconds=1.0)
    assert board.trials[0].history == ((3, 5.0),)
    board.log(0, losses((6, 3.9)), seconds=1.0)
    board.write()
    (trial,) = read_trials(storage)
    assert (trial.steps, trial.seconds) == (6, 4.0)
    assert trial.history == ((3, 5.0), (6, 3.9))
    assert trial.metrics == {"step": 6, "val_loss": 3.9, "load_cv": 0.1}
    assert {sample.labels.get("status"): sample.value for sample in sweep_samples(board)}["running"] == 1


def test_a_log_gets_a_line_for_each_change_and_the_table_at_the_end(tmp_path: Path, capsys: Any) -> None:
    board, text = Board(sweep_of(constraints=["load_cv <= 0.3"]), open_storage(tmp_path)), io.StringIO()
    board.put(*population(3))
    with Table(board, Console(file=text, width=120)) as table:
        board.put(replace(board.trials[1], status="failed", reason="no\nroom"))
        table.update()
        # Sooner than the table looks again.
        board.put(replace(board.trials[2], status="finished"))
    said = capsys.readouterr().out
    assert "trial 2 finished at step" in said
    assert "trial 1 failed at step 9, val_loss 4: optim.lr=0.01, optim.beta1=0.8 (no room)" in said
    lines = text.getvalue().splitlines()
    assert lines[0].strip() == "s: 1 failed, 1 finished, 1 pending of at most 16 trials; 27 steps"
    assert [line.split("│")[1].strip() for line in lines[4:-1]] == ["2", "0", "1"]


@pytest.mark.parametrize(
    ("scheduler", "changed", "message"),
    [
        ("none", {"grace_steps": 9, "reduction_factor": 4, "perturb_steps": 9}, "no cluster at RAY_ADDRESS"),
        ("asha", {"perturb_steps": 9}, "no cluster at RAY_ADDRESS"),
        ("asha", {"grace_steps": 9}, r"sweep.grace_steps=9 differs from the sweep .* which has 3"),
        ("pbt", {"perturb_steps": 9}, r"sweep.perturb_steps=9 differs from the sweep"),
    ],
)
def test_a_sweep_goes_on_with_other_settings_if_they_have_no_effect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheduler: str, changed: dict[str, int], message: str
) -> None:
    # It goes on as far as its cluster.
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    steps = {"grace_steps": 3, "perturb_steps": 3}
    train = [f"train.storage={tmp_path}", "train.eval_every=3"]
    before = build_config(sweep_of(scheduler=scheduler, **steps).model_dump(mode="json"), train)
    now = build_config(sweep_of(scheduler=scheduler, **steps | changed).model_dump(mode="json"), train)
    open_storage(before.train.run_uri).write(SWEEP_SETTINGS, to_yaml(before).encode())
    with pytest.raises(ConfigError, match=message):
        run_sweep(now)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xfe", "it holds no settings"),
        (b"train: [", "it holds no settings"),
        (b"[1, 2]", "it holds no settings"),
        (b"train: {steps: many}", "train.steps='many' is not allowed"),
    ],
)
def test_damaged_settings_of_a_sweep_are_told(tmp_path: Path, content: bytes, why: str) -> None:
    config = build_config(sweep_of().model_dump(mode="json"), [f"train.storage={tmp_path}"])
    open_storage(config.train.run_uri).write(SWEEP_SETTINGS, content)
    with pytest.raises(
        DataError, match=f"{SWEEP_SETTINGS} of .* cannot be used: {why}.*restore it, or set another"
    ):
        run_sweep(config)
    assert open_storage(config.train.run_uri).read(SWEEP_SETTINGS) == content


def test_changes_of_a_population_are_read_as_they_were_written(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    assert read_changes(storage, []) == []
    changes = plan(sweep_of(scheduler="pbt", perturb_steps=9), population(), 9)
    write_changes(storage, changes)
    assert read_changes(storage, range(8)) == changes
    with pytest.raises(DataError, match=r"it names trial [67], of which trials.jsonl knows nothing"):
        read_changes(storage, range(6))
    storage.write(CHANGES, b"{}\n")
    with pytest.raises(DataError, match=f"{CHANGES} of .* line 1: step: Field required"):
        read_changes(storage, range(8))


def test_a_sweep_leaves_its_outcome_on_any_storage(storage_uri: str) -> None:
    board = Board(sweep_of(scheduler="pbt", perturb_steps=9), open_storage(storage_uri))
    board.put(*population())
    board.put(replace(board.trials[7], status="finished"))
    write_changes(board.storage, plan(board.config, population(), 9))
    board.write()
    write_outcome(board)
    assert read_trials(open_storage(storage_uri)) == list(board.trials.values())
    best = build_config(yaml.safe_load(board.storage.read(BEST)))
    assert (best.optim.lr, best.optim.beta1) == (1e-2, 0.8)
    page = board.storage.read(SWEEP_PAGE).decode()
    assert "Trials that went on from others" in page


def test_runs_and_sweeps_keep_out_of_each_others_folders(tmp_path: Path) -> None:
    config = build_config(sweep_of().model_dump(mode="json"), [f"train.storage={tmp_path}"])
    folder = open_storage(config.train.run_uri)
    folder.write(SWEEP_SETTINGS, to_yaml(config).encode())
    with pytest.raises(ConfigError, match=r"is the folder of a sweep. Fix: set another train.name"):
        run_training(config)
    folder.delete(SWEEP_SETTINGS)
    folder.write(RUN_SETTINGS, to_yaml(config).encode())
    with pytest.raises(ConfigError, match=r"is the folder of a run. Fix: set another train.name"):
        run_sweep(config)


def test_a_sweep_that_has_ended_needs_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    config = build_config(sweep_of(trials=8).model_dump(mode="json"), [f"train.storage={tmp_path}"])
    folder = open_storage(config.train.run_uri)
    folder.write(SWEEP_SETTINGS, to_yaml(config).encode())
    write_trials(folder, [replace(trial, status="finished", steps=27) for trial in population()])
    with caplog.at_level("INFO", "moe_ray"):
        assert len(run_sweep(config).trials) == 8
    assert "all 8 trials have ended; nothing to do" in caplog.text
    assert folder.exists(SWEEP_PAGE)
    # Of a population that was killed between two generations.
    write_trials(folder, [replace(trial, status="finished") for trial in population()])
    with caplog.at_level("INFO", "moe_ray"), pytest.raises(ConfigError, match="no cluster at RAY_ADDRESS"):
        run_sweep(config)
    assert "0 trials have ended, 8 have not" in caplog.text


def test_trials_end_at_their_own_last_step(tmp_path: Path) -> None:
    board = Board(sweep_of(), open_storage(tmp_path))
    assert [board.last_step(Trial(0, "t", values)) for values in ({}, {"train.steps": 9})] == [27, 9]
