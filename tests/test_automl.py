"""AutoML: its law finds what was planted as surely as it says, it keeps to the budget, and refuses mistakes."""

import asyncio
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_ray.config import Config, build_config, load_config
from moe_ray.errors import ConfigError, TrainingError
from moe_ray.storage import open_storage
from moe_ray.tuning.auto.ladder import ladder, ladder_values, rung_flops
from moe_ray.tuning.auto.law import PRIORS, Law, fit_law
from moe_ray.tuning.auto.recommend import candidates, fit_ladder, model_flops, recommend
from moe_ray.tuning.auto.shapes import fewest_steps, points_of
from moe_ray.tuning.board import Board
from moe_ray.tuning.check import check_sweep
from moe_ray.tuning.outcome import write_outcome
from moe_ray.tuning.search import new_trial
from moe_ray.tuning.space import resolve
from moe_ray.tuning.trials import Trial
from tests.browser import opened

NOISE = 0.01


def automl(**sweep: object) -> Config:
    """The quickstart's model, with a budget that leaves some forty times as much as the largest run has."""
    settings = {
        "model": {"init_std": 0.06},
        "data": {"sequence_length": 128},
        "optim": {"lr": 4e-3, "warmup_steps": 40},
        "train": {"steps": 350, "global_batch": 16},
        "sweep": {"auto": True, "budget": 3e14, "trials": 24, **sweep},
    }
    return build_config(settings)


CONFIG = automl()
PLANS = ladder(CONFIG)
POINTS = points_of(CONFIG, PLANS)
TRIALS = [new_trial(CONFIG, number, values) for number, values in enumerate(ladder_values(CONFIG))]


def planted(seed: int) -> Law:
    """A law that is as likely as any other, before the runs."""
    rng = np.random.default_rng(seed)
    mean_P, deviation_P = np.array(list(PRIORS.values())).T
    law_P = mean_P + deviation_P * rng.standard_normal(len(PRIORS))
    middle = {name: float(getattr(POINTS, name).mean()) for name in POINTS.__dataclass_fields__}
    return Law(middle, law_P, law_P[None], np.array([NOISE]))


def losses_of(law: Law, seed: int) -> np.ndarray:
    """What the ladder's runs would have, with noise."""
    noise = NOISE * np.random.default_rng(seed + 1000).standard_normal(len(PLANS))
    return np.exp(law.best(POINTS) + noise)


def finished(losses: Sequence[float]) -> list[Trial]:
    """The trials of the ladder with these losses."""
    return [
        replace(
            trial,
            status="finished",
            steps=trial.values["train.steps"],
            metrics={"val_loss": float(loss)},
            history=((trial.values["train.steps"], float(loss)),),
        )
        for trial, loss in zip(TRIALS, losses, strict=True)
    ]


def test_intervals_hold_what_they_promise() -> None:
    """Over many laws, 90% intervals of parameters and of losses far from the runs hold nine of ten."""
    ladder = fit_ladder(CONFIG, finished(losses_of(planted(0), 0)))
    far = points_of(CONFIG, candidates(CONFIG, ladder.law, 2.4e14, ladder.shapes)[::37])
    parameters, predictions = [], []
    for seed in range(25):
        law = planted(seed)
        fitted = fit_law(POINTS, losses_of(law, seed), samples=80, seed=seed)
        low_P, high_P = np.quantile(fitted.samples_RP, (0.05, 0.95), axis=0)
        low_M, high_M = np.quantile(fitted.predict(far), (0.05, 0.95), axis=0)
        parameters.append((low_P <= law.best_P) & (law.best_P <= high_P))
        truth_M = law.best(far)
        predictions.append((low_M <= truth_M) & (truth_M <= high_M))
    assert 0.82 <= np.mean(parameters) <= 0.97
    assert 0.78 <= np.mean(predictions) <= 0.98


def test_an_outlier_moves_little() -> None:
    law = planted(1)
    losses = losses_of(law, 1)
    spoilt = losses.copy()
    spoilt[3] *= 1.3
    sound, robust = (fit_law(POINTS, values, samples=50) for values in (losses, spoilt))
    others = POINTS.take(np.arange(len(PLANS)) != 3)
    assert np.abs(robust.best(others) - sound.best(others)).max() < 0.03


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_the_choice_is_nearly_the_best_of_the_planted_law(seed: int) -> None:
    law = planted(seed)
    fitted = fit_ladder(CONFIG, finished(losses_of(law, seed)))
    found = recommend(CONFIG, fitted)
    plans = candidates(CONFIG, fitted.law, model_flops(CONFIG), fitted.shapes)
    (chosen,) = [
        number
        for number, plan in enumerate(plans)
        if plan.shape.label == found.label and plan.batch == found.values["train.global_batch"]
    ]
    truth_M = np.exp(law.best(points_of(CONFIG, plans)))
    assert truth_M[chosen] / truth_M.min() < 1.02
    assert np.median(truth_M) / truth_M.min() > 1.03, "most others are much worse"
    width = found.loss.high - found.loss.low
    assert found.loss.low - width / 2 <= truth_M[chosen] <= found.loss.high + width / 2


def test_sureness_is_how_often_it_is_right() -> None:
    stated, right = [], []
    for seed in range(5):
        law = planted(seed)
        fitted = fit_ladder(CONFIG, finished(losses_of(law, seed)))
        plans = candidates(CONFIG, fitted.law, model_flops(CONFIG), fitted.shapes)[::11]
        points = points_of(CONFIG, plans)
        loss_RM, truth_M = fitted.law.predict(points), law.best(points)
        for one, other in np.random.default_rng(seed).integers(0, len(plans), (40, 2)).tolist():
            stated.append((loss_RM[:, one] < loss_RM[:, other]).mean())
            right.append(float(truth_M[one] < truth_M[other]))
    sure = np.array(stated) > 0.9
    assert np.array(right)[sure].mean() > 0.9
    assert abs(np.mean(stated) - np.mean(right)) < 0.1


def test_what_the_runs_do_not_tell_is_said() -> None:
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(len(PLANS)))
    found = recommend(CONFIG, fit_ladder(CONFIG, finished(5 * noise)))
    assert sum("cannot tell" in warning for warning in found.warnings) >= 3
    assert min(decision.sure for decision in found.decisions) < 0.8


def test_law_that_does_not_hold_is_said() -> None:
    largest = POINTS.flops > POINTS.flops.max() - 0.3
    losses = losses_of(planted(2), 2) * np.where(largest, 1.5, 1.0)
    found = recommend(CONFIG, fit_ladder(CONFIG, finished(losses)))
    assert any("the law does not hold" in warning for warning in found.warnings)


def test_ladder_keeps_to_its_share() -> None:
    spent = sum(
        plan.shape.flops_per_token * plan.steps * plan.batch * CONFIG.data.sequence_length for plan in PLANS
    )
    assert CONFIG.sweep.budget is not None
    assert 0.9 < spent / (CONFIG.sweep.budget * CONFIG.sweep.ladder_share) <= 1
    assert all(plan.steps >= fewest_steps(CONFIG, plan.batch) for plan in PLANS)
    for trial in TRIALS:
        assert resolve(CONFIG, trial.values).train.steps == trial.values["train.steps"]
    for name in ("model.dim", "model.top_k", "model.num_experts", "model.num_shared_experts"):
        assert len({trial.values[name] for trial in TRIALS}) > 1
    assert ladder_values(CONFIG) == ladder_values(automl())
    assert ladder_values(CONFIG) != ladder_values(automl(seed=1))


def test_too_small_a_budget_is_refused_with_the_smallest() -> None:
    with pytest.raises(ConfigError, match="does not pay for a ladder of 24 runs") as caught:
        check_sweep(automl(budget=1e10))
    (smallest,) = re.findall(r"at least (\S+) FLOPs", caught.value.fix)
    check_sweep(automl(budget=float(smallest)))
    assert len(ladder(automl(budget=float(smallest)))) == 24
    with pytest.raises(ConfigError, match="does not pay"):
        check_sweep(automl(budget=float(smallest) * 0.95))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"budget": None}, "sweep.budget=null"),
        ({"trials": 5}, "sweep.trials=5 are too few"),
        ({"space": {"optim.lr": {"choice": [1e-3]}}}, "sweep.space has no meaning with sweep.auto=true"),
        ({"mutate": ["optim.lr"]}, "sweep.mutate has no meaning"),
        ({"scheduler": "asha"}, "sweep.scheduler='asha' has no meaning"),
        ({"metric": "loss"}, "sweep.metric='loss' has no meaning"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        check_sweep(automl(**settings))


def test_command_of_the_page_is_possible() -> None:
    line = re.findall(
        r"^python jobs/sweep.py .*$", Path("docs/automl.md").read_text(encoding="utf-8"), re.MULTILINE
    )[0]
    _, _, path, *overrides = shlex.split(line)
    config = load_config(path, overrides)
    check_sweep(config)
    assert len(ladder(config)) == config.sweep.trials


def test_weights_that_are_given_leave_nothing_to_pick() -> None:
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"init_from": "folder"})})
    with pytest.raises(ConfigError, match="picks an architecture"):
        check_sweep(config)


@pytest.mark.parametrize("preset", ["switch", "glam", "olmoe", "deepseek_v3", "gpt_oss"])
def test_architectures_of_presets_are_possible(preset: str) -> None:
    config = build_config(
        {
            "model": {"preset": preset},
            "sweep": {"auto": True, "budget": 1e16, "trials": 16},
            "train": {"steps": 350},
        }
    )
    for values in ladder_values(config):
        assert resolve(config, values).model.preset == preset


def test_outcome_can_be_trained_and_read(tmp_path: Path) -> None:
    board = Board(CONFIG, open_storage(str(tmp_path)))
    losses = losses_of(planted(3), 3)
    board.put(*finished(losses)[:20], replace(TRIALS[20], status="failed", reason="<b>lost</b>"))
    write_outcome(board)
    assert not (tmp_path / "best.yaml").exists(), "the ladder has not ended"
    board.put(*finished(losses)[21:])
    write_outcome(board)
    best, found = load_config(tmp_path / "best.yaml"), json.loads((tmp_path / "auto.json").read_text())
    tokens = best.train.steps * best.train.global_batch * best.data.sequence_length
    flops = best.model.flops_per_token(best.data.sequence_length) * tokens
    assert flops == pytest.approx(found["flops"])
    assert CONFIG.sweep.budget is not None
    assert flops + sum(rung_flops(CONFIG)) < CONFIG.sweep.budget
    assert best.optim.lr == found["values"]["optim.lr"]
    assert best.train.name == "run-best"
    assert not best.sweep.auto

    async def look() -> None:
        async with opened(tmp_path / "sweep.html", 390) as tab:
            text = await tab.evaluate("document.querySelector('.findings').textContent")
            assert found["label"] in text
            assert all(warning in text for warning in found["warnings"])
            assert await tab.evaluate("document.querySelectorAll('[data-figure=isoflop] svg path').length") > 5
            named = "[...document.querySelectorAll('[data-figure=law] .role-legend-label text')]"
            names = await tab.evaluate(f"{named}.map(text => text.textContent)")
            assert names == ["best models, by the law", "runs"]
            assert not re.search(r"\b1 layers", text)
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await tab.evaluate(overflow) == 0
            assert tab.errors == []

    asyncio.run(look())


def test_ladders_that_failed_say_so(tmp_path: Path) -> None:
    board = Board(CONFIG, open_storage(str(tmp_path)))
    board.put(*finished(losses_of(planted(3), 3))[:8], *(replace(trial, status="failed") for trial in TRIALS[8:]))
    with pytest.raises(TrainingError, match="8 runs of the ladder have finished, too few of 24"):
        write_outcome(board)
    assert "16 of 24 trials failed" in (tmp_path / "sweep.html").read_text()
