"""The space of a sweep and what is drawn from it, without Ray: conditions, grids, seeds, ranking."""

import math
from pathlib import Path
from typing import Any

import pytest

from moe_ray.config import Config, build_config
from moe_ray.errors import DataError
from moe_ray.storage import open_storage
from moe_ray.tuning.check import check_sweep
from moe_ray.tuning.objective import ranked
from moe_ray.tuning.search import Search
from moe_ray.tuning.space import draw, grid_points, resolve
from moe_ray.tuning.trials import TRIALS, Trial, read_trials, write_trials


def sweep_of(space: dict[str, Any], **settings: Any) -> Config:
    return build_config({"sweep": {"space": space, **settings}, "optim": {"warmup_steps": 0}})


LR = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}


def test_draws_are_within_and_depend_on_seed_and_number_alone() -> None:
    space = {
        "optim.lr": {"loguniform": [1e-4, 1e-2]},
        "optim.weight_decay": {"uniform": [0.0, 0.5]},
        "train.micro_batch": {"integers": [2, 9, 3]},
        "model.num_experts": {"grid": [4, 8]},
        "model.top_k": {"grid": [1, 2]},
    }
    config = sweep_of(space)
    drawn = [draw(config, number) for number in range(400)]
    assert drawn[::-1] == [draw(config, number) for number in reversed(range(400))]
    assert drawn[0] != draw(sweep_of(space, seed=1), 0)
    for values in drawn:
        resolve(config, values)
    assert {values["train.micro_batch"] for values in drawn} == {2, 5, 8}
    logs = [math.log10(values["optim.lr"]) for values in drawn]
    assert all(-4 <= log <= -2 for log in logs)
    assert sum(logs) / 400 == pytest.approx(-3, abs=0.1)
    combinations = [(values["model.num_experts"], values["model.top_k"]) for values in drawn[:5]]
    assert combinations == [(4, 1), (4, 2), (8, 1), (8, 2), (4, 1)]


def test_conditions_prune_the_grid() -> None:
    config = sweep_of(
        {
            "model.router": {"choice": ["top_k", "hash"]},
            "model.score_func": {"choice": ["softmax", "sigmoid"], "when": {"model.router": "top_k"}},
            "optim.beta1": {"choice": [0.8, 0.9], "when": {"model.router": ["hash"], "model.dim": 256}},
        },
        algorithm="grid",
    )
    check_sweep(config)
    assert list(grid_points(config)) == [
        {"model.router": "top_k", "model.score_func": "softmax"},
        {"model.router": "top_k", "model.score_func": "sigmoid"},
        {"model.router": "hash", "optim.beta1": 0.8},
        {"model.router": "hash", "optim.beta1": 0.9},
    ]


def test_what_is_not_varied_takes_no_time_to_count() -> None:
    fields = ["lr", "min_lr_ratio", "weight_decay", "beta1", "beta2", "eps", "grad_clip", "warmup_steps"]
    conditional = {
        f"optim.{field}": {"choice": [number / 100 for number in range(12)], "when": {"model.router": "hash"}}
        for field in fields
    }
    config = sweep_of({"model.router": {"choice": ["top_k", "random"]}} | conditional, algorithm="grid")
    assert list(grid_points(config)) == [{"model.router": "top_k"}, {"model.router": "random"}]


def test_settings_of_a_trial_are_those_of_the_sweep_with_its_values() -> None:
    tree = {"model": {"preset": "olmoe", "dim": 128}, "sweep": {"space": LR}}
    config = resolve(build_config(tree), {"optim.lr": 0.5, "model.preset": "mixtral"})
    assert config == build_config({"model": {"preset": "mixtral", "dim": 128}, "optim": {"lr": 0.5}})


def test_values_that_exclude_each_other_are_infeasible_trials() -> None:
    config = sweep_of(
        {"model.num_experts": {"choice": [2, 4]}, "model.top_k": {"choice": [1, 4]}}, algorithm="grid", trials=4
    )
    search = Search(config, [])
    trials = [search.propose() for _ in range(5)]
    assert trials.pop() is None
    assert [trial.status for trial in trials if trial] == ["pending", "infeasible", "pending", "pending"]
    assert trials[1] is not None
    assert "model.top_k=4 is more than model.num_experts=2" in (trials[1].reason or "")
    assert trials[0] is not None
    assert (trials[0].active_parameters or 0) < (trials[0].parameters or 0)


@pytest.mark.parametrize("algorithm", ["random", "optuna"])
def test_search_goes_on_where_it_was(algorithm: str) -> None:
    config = sweep_of(
        LR | {"parallel.workers": {"choice": [1, [1, 2]]}, "train.micro_batch": {"integers": [2, 9, 3]}},
        algorithm=algorithm,
        first=[{}],
        trials=6,
    )
    search, past = Search(config, []), []
    for _ in range(3):
        trial = search.propose()
        assert trial is not None
        past.append(Trial(**{**vars(trial), "status": "finished", "metrics": {"val_loss": 1.0}}))
        search.tell(past[-1])
    assert past[0].values == {"optim.lr": 1e-3, "parallel.workers": 1, "train.micro_batch": 8}
    resumed = Search(config, past)
    left = [trial for trial in (resumed.propose() for _ in range(4)) if trial]
    assert [trial.number for trial in left] == [3, 4, 5]
    learned = {trial.values["optim.lr"] for trial in (*past, *left)}
    assert len(learned) == 6
    if algorithm == "random":
        assert [trial.values for trial in left] == [draw(config, number) for number in (3, 4, 5)]


def test_optuna_learns_from_trials() -> None:
    config = sweep_of({"optim.lr": {"uniform": [0.1, 1.0]}}, algorithm="optuna", trials=40)
    search, found = Search(config, []), []
    for _ in range(40):
        trial = search.propose()
        assert trial is not None
        lr = trial.values["optim.lr"]
        found.append(lr)
        search.tell(Trial(**{**vars(trial), "status": "finished", "metrics": {"val_loss": (lr - 0.3) ** 2}}))
    assert sum(abs(lr - 0.3) < 0.1 for lr in found[20:]) > 2 * 20 * 0.2 / 0.9


def test_trials_within_bounds_rank_before_others() -> None:
    config = sweep_of(LR, constraints=["load_cv <= 0.3"])

    def trial(number: int, status: Any = "finished", **metrics: float) -> Trial:
        return Trial(number, f"trial-{number}", {}, status, metrics=metrics)

    trials = [
        trial(0, val_loss=1.0, load_cv=0.9),
        trial(1, val_loss=3.0, load_cv=0.3),
        trial(2, val_loss=1.0, load_cv=0.5),
        trial(3, "stopped", val_loss=2.0, load_cv=0.1),
        trial(4, "failed", val_loss=0.1, load_cv=0.1),
        trial(5, "running"),
        trial(6, val_loss=0.5),
    ]
    assert [trial.number for trial in ranked(config.sweep, trials)] == [3, 1, 2, 0, 6]
    best = sweep_of(LR, mode="max", metric="load_cv").sweep
    assert [trial.number for trial in ranked(best, trials)] == [0, 2, 1, 3]


def test_trials_are_read_as_they_were_written(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert read_trials(storage) == []
    trials = [Trial(1, "b", {"model.top_k": 2}), Trial(0, "a", {"optim.lr": 0.1}, history=((3, 2.5), (6, 2.0)))]
    write_trials(storage, trials)
    assert read_trials(storage) == trials[::-1]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"number": 0}', "line 1: run: Field required"),
        (b'{"number": 0, "run": "a", "values": {}}\nx', "line 2: Invalid JSON"),
        (b"\xff", "line 1: Invalid JSON"),
        (b"[" * 100_000, "line 1: Invalid JSON"),
        (b'{"number": 0, "run": "a", "values": null}', "line 1: values"),
        (b'{"number": 0, "run": "a", "values": {}, "status": "flying"}', "line 1: status"),
        (b'{"number": 0, "run": "a", "values": {}}\n' * 2, "a number occurs twice"),
    ],
)
def test_damaged_trials_are_named(tmp_path: Path, content: bytes, why: str) -> None:
    storage = open_storage(tmp_path)
    storage.write(TRIALS, content)
    with pytest.raises(DataError, match=rf"trials.jsonl .* cannot be used: {why}.*set another train.name"):
        read_trials(storage)


def test_wide_ranges_of_whole_numbers_are_drawn_from_and_not_listed() -> None:
    config = sweep_of({"optim.warmup_steps": {"integers": [1, 10**12]}})
    check_sweep(config)
    assert 1 <= draw(config, 0)["optim.warmup_steps"] <= 10**12
