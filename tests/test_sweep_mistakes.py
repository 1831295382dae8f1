"""Mistakes in the settings of a sweep: each is refused before any run, in one line with what to do instead."""

import re
from pathlib import Path
from typing import Any

import pytest

from moe_ray.config import ModelConfig, build_config
from moe_ray.errors import ConfigError
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model
from moe_ray.tuning.check import check_sweep
from moe_ray.tuning.search import Search
from moe_ray.tuning.space import draw

LR = {"optim.lr": {"loguniform": [1e-4, 1e-2]}}
SIZES = {"model.num_experts": {"choice": [4, 8]}, "model.top_k": {"choice": [1, 2, 4]}}
SIGMOID = {
    "model.score_func": {"choice": ["softmax", "sigmoid"]},
    "model.route_scale": {"uniform": [1, 2.5], "when": {"model.score_func": "sigmoid"}},
}


def refused(space: Any, message: str, **settings: Any) -> None:
    """Building the configuration or checking the sweep says it, in one line."""
    tree: dict[str, Any] = {"sweep": {"space": space, **settings}, "optim": {"warmup_steps": 0}}
    with pytest.raises(ConfigError, match=message) as error:
        check_sweep(build_config(tree))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({"chioce": [1]}, "unknown setting 'sweep.space.optim.lr.chioce'.*mean 'sweep.space.optim.lr.choice'"),
        (
            [1, 2],
            r"sweep.space.optim.lr=\[1, 2\] is not a section.*mapping of fields such as choice, grid",
        ),
        ({"choice": 0.1}, r"sweep.space.optim.lr.choice=0.1 is not allowed.*: one of these"),
        (
            {"uniform": [0.1, "high"]},
            r"optim.lr.uniform\[1\]='high' is not allowed.*number.*\[low, high\]",
        ),
        ({"uniform": [0.1]}, r"sweep.space.optim.lr.uniform=\[0.1\] is not allowed: field required"),
        ({"integers": [1, 2.5, 3]}, r"sweep.space.optim.lr.integers\[1\]=2.5 is not allowed.*\[low, high, step\]"),
        ({"integers": [1, 2, 3, 4]}, r"optim.lr.integers=\[1, 2, 3, 4\] .*at most 3 items"),
        ({"integers": [1, 4, 0]}, r"optim.lr.integers=\[1, 4, 0\] holds no value.*step of at least 1"),
        ({"integers": [4, 1]}, r"optim.lr.integers=\[4, 1\] holds no value.*low <= high"),
        ({"integers": [1, 2**60]}, r"optim.lr.integers=\[1, 1152921504606846976\] goes beyond"),
        ({"uniform": [2, 1]}, r"sweep.space.optim.lr.uniform=\[2.0, 1.0\] is no range"),
        ({"loguniform": [0, 1]}, r"sweep.space.optim.lr.loguniform=\[0.0, 1.0\].* low > 0"),
        ({"choice": [1], "uniform": [0, 1]}, "sweep.space.optim.lr has choice and uniform.*exactly one"),
        ({}, "sweep.space.optim.lr has no kind of values"),
        ({"choice": []}, r"sweep.space.optim.lr.choice=\[\] holds no value"),
        ({"uniform": [-1, 1]}, r"sweep.space: optim.lr=-1.* greater than 0"),
        ({"choice": [1], "when": 3}, "sweep.space.optim.lr.when=3 is not allowed: .*mapping"),
    ],
)
def test_a_dimension_is_named_with_its_value_and_what_it_may_be(dimension: Any, message: str) -> None:
    refused({"optim.lr": dimension}, message)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "sweep.space varies nothing"),
        ({"optim.lrr": {"choice": [1]}}, r"unknown setting 'optim.lrr'.*did you mean 'optim.lr'"),
        ({"optim": {"choice": [1]}}, "names 'optim', a whole section"),
        ({"model.top_k": {"choice": [1, 9]}}, r"sweep.space: model.top_k=9 .*8"),
        ({"model.top_k": {"uniform": [1, 4]}}, r"model.top_k=2.8.*integer"),
        ({"train.name": {"choice": ["a"]}}, "train.name, which all trials have in common"),
        ({"serve.dtype": {"choice": ["float32"]}}, "serve.dtype, which all trials have in common"),
        ({"sweep.trials": {"choice": [4, 8]}}, "sweep.trials, which all trials have in common"),
    ],
)
def test_only_settings_of_a_run_are_varied(space: dict[str, Any], message: str) -> None:
    refused(space, message)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"optim.eps": {"choice": [1], "when": {"model.rout": "hash"}}}, "did you mean 'model.router'"),
        (
            {"optim.eps": {"choice": [1], "when": {"model.score_func": "sig"}}},
            "score_func='sig'.*sigmoid",
        ),
        ({"optim.eps": {"choice": [1], "when": {"optim.eps": 1}}}, "optim.eps depends on itself"),
        ({"optim.eps": {"choice": [1], "when": {"optim.lr": 1.0}}} | LR, "depends on optim.lr, which comes after"),
        (
            {
                "optim.eps": {"choice": [1], "when": {"optim.beta1": 0.8}},
                "optim.beta2": {"choice": [0.9], "when": {"optim.eps": 1}},
                "optim.beta1": {"choice": [0.8], "when": {"optim.beta2": 0.9}},
            },
            "optim.eps and optim.beta1 depend on each other",
        ),
        (
            {"optim.eps": {"choice": [1], "when": {"model.router": []}}},
            "optim.eps.when names no value of model.r",
        ),
        (
            {"optim.eps": {"choice": [1], "when": {"model.router": "hash"}}},
            "optim.eps is never varied.*as configured: {'model.router': 'top_k'}",
        ),
        (
            {
                "model.router": {"choice": ["top_k", "random"]},
                "optim.eps": {"choice": [1], "when": {"model.router": "hash"}},
            },
            r"optim.eps is never varied: no trial meets its `when`, {'model.router': 'hash'}",
        ),
        (
            {
                "model.router": {"choice": ["top_k", "hash"]},
                "model.score_func": {"choice": ["sigmoid"], "when": {"model.router": "top_k"}},
                "optim.eps": {"choice": [1], "when": {"model.router": "hash", "model.score_func": "sigmoid"}},
            },
            "optim.eps is never varied",
        ),
        (LR | {"optim.eps": {"choice": [1], "when": {"optim.lr": 1e-3}}}, "optim.eps is never varied"),
        (
            {
                "model.preset": {"choice": ["basic", "deepseek_v3"]},
                "optim.eps": {"choice": [1], "when": {"model.expert_bias": True}},
            },
            "looks at model.expert_bias, which model.preset=deepseek_v3 decides.*{model.preset: …}",
        ),
        (
            {"optim.eps": {"choice": [1], "when": {"model.dim": 64}}, "model.preset": {"choice": ["basik"]}},
            "model.preset='basik' is not allowed",
        ),
        ({"checkpoint.best_metric": {"choice": ["val_loss", "los"]}}, "'los', which no run logs"),
    ],
)
def test_conditions_can_be_met(space: dict[str, Any], message: str) -> None:
    refused(LR | space if "optim.lr" not in space else space, message)


@pytest.mark.parametrize(
    ("space", "first"),
    [
        (
            {
                "optim.weight_decay": {"integers": [0, 2]},
                "optim.eps": {"choice": [1e-8], "when": {"optim.weight_decay": 1.0}},
            },
            [],
        ),
        (
            {
                "model.score_func": {"choice": ["sigmoid"]},
                "model.route_scale": {"choice": [1.5, 2.0], "when": {"model.score_func": "softmax"}},
            },
            [{"model.route_scale": 2.0}],
        ),
        (
            {
                "model.router": {"choice": ["top_k", "hash"]},
                "model.score_func": {"choice": ["sigmoid"], "when": {"model.router": "top_k"}},
                "optim.eps": {"choice": [1e-8], "when": {"model.score_func": "softmax"}},
            },
            [],
        ),
        ({"optim.eps": {"choice": [1e-8], "when": {"model.rope_scaling": {"type": "linear", "factor": 2}}}}, []),
        ({"optim.eps": {"choice": [1e-8], "when": {"optim.lr": 1e-3}}}, [{"optim.lr": 1e-3}]),
    ],
)
def test_conditions_that_some_trial_meets_are_taken(space: dict[str, Any], first: list[dict[str, Any]]) -> None:
    model = {"rope_scaling": {"type": "linear", "factor": 2}}
    config = build_config({"model": model, "sweep": {"space": LR | space, "first": first}})
    check_sweep(config)
    values = [Search(config, []).propose(), *(draw(config, number) for number in range(20))]
    assert any([*LR, *space][-1] in (of if isinstance(of, dict) else of.values) for of in values)


def test_what_a_folder_decides_is_judged_when_it_is_read(tmp_path: Path) -> None:
    sizes = {"dim": 32, "num_layers": 2, "num_experts": 8, "expert_dim": 16, "vocab_size": 64}
    groups = {"num_expert_groups": 2, "num_limited_groups": 1}
    model = build_model(ModelConfig(preset="deepseek_v3", top_k=2, **sizes, **groups), seed=0)
    save_folder(model, tmp_path / "model", tokenizer_json=b"{}", sidecars={}, dtype=None)
    for has_bias in (True, False):
        space = {"optim.eps": {"choice": [1e-8], "when": {"model.expert_bias": has_bias}}}
        config = build_config({"model": {"init_from": str(tmp_path / "model")}, "sweep": {"space": LR | space}})
        check_sweep(config)
        if has_bias:
            check_sweep(resolve_model(config))
        else:
            with pytest.raises(ConfigError, match=r"optim.eps is never varied"):
                check_sweep(resolve_model(config))


def test_a_misspelled_metric_of_checkpoints_is_told_before_any_trial() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint.best_metric names 'val_los'"):
        check_sweep(build_config({"checkpoint": {"best_metric": "val_los"}, "sweep": {"space": LR}}))


def test_values_of_a_grid_that_repeat_count_once() -> None:
    space = {"model.top_k": {"choice": [1, 1, 2]}}
    check_sweep(build_config({"sweep": {"space": space, "algorithm": "grid", "trials": 2}}))


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"optim.lrr": 1e-3}, r"sweep.first\[1\] sets optim.lrr, which is not in sweep.space.*mean 'optim.lr'"),
        ({"optim.lr": -1}, r"sweep.first\[1\]: optim.lr=-1 is not allowed"),
        ({"optim.lr": 0.1}, r"optim.lr=0.1 is not in sweep.space, where it is loguniform \[0.0001, 0.01\]"),
        ({"model.top_k": 3}, r"model.top_k=3 is not in sweep.space, where it is choice \[1, 2, 4\]"),
        ({"train.micro_batch": 4}, r"train.micro_batch=4 is not .* integers \[2, 9, 3\]"),
        ({"parallel.ep": "auto"}, r"parallel.ep='auto' is not .* integers \[1, 4\]"),
        ({"parallel.memory_gib": None}, r"parallel.memory_gib=None is not .* uniform \[1.0, 2.0\]"),
        (
            {"model.score_func": "softmax", "model.route_scale": 2.0},
            "model.route_scale, which is varied only when {'model.score_func': 'sigmoid'}",
        ),
    ],
)
def test_first_trials_are_of_the_space(first: dict[str, Any], message: str) -> None:
    space = {
        **LR,
        **SIZES,
        **SIGMOID,
        "train.micro_batch": {"integers": [2, 9, 3]},
        "parallel.ep": {"integers": [1, 4]},
        "parallel.memory_gib": {"uniform": [1, 2]},
    }
    refused(space, message, first=[{}, first])


def test_first_trials_may_have_any_value_of_the_space() -> None:
    first = [{}, {"optim.lr": 1e-4, "model.top_k": 4}, {"model.score_func": "sigmoid", "model.route_scale": 1}]
    check_sweep(build_config({"sweep": {"space": LR | SIZES | SIGMOID, "first": first}}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "load_cv_by_layer"}, "sweep.metric names 'load_cv_by_layer', which is not one number"),
        ({"metric": "val_los"}, "sweep.metric names 'val_los', which no run logs.*did you mean 'val_loss'"),
        ({"metric": "val_perplexity_by_domain"}, "names 'val_perplexity_by_domain', which is not one number"),
        ({"constraints": ["laod_cv <= 0.3"]}, "sweep.constraints names 'laod_cv', which no.*mean 'load_cv'"),
        ({"constraints": ["load_cv about 0.3"]}, "'load_cv about 0.3', which is no bound"),
        ({"constraints": ["loss >= 3", "loss <= 2"]}, "'loss >= 3' and 'loss <= 2', which no trial can meet"),
        ({"constraints": ["loss < 2", "load_cv < 1", "loss >= 2"]}, "'loss >= 2' and 'loss < 2'"),
    ],
)
def test_metrics_are_those_that_runs_log(settings: dict[str, Any], message: str) -> None:
    refused(LR, message, **settings)


def test_bounds_may_meet() -> None:
    constraints = ["loss >= 2", "loss <= 2", "load_cv > 1", "lr < 0.5"]
    check_sweep(build_config({"sweep": {"space": LR, "constraints": constraints, "metric": "tokens_per_second"}}))


@pytest.mark.parametrize(
    ("space", "settings", "message"),
    [
        (LR, {"budget": 1e15}, "sweep.budget=1000000000000000.0 has no meaning without sweep.auto=true"),
        (LR, {"ladder_share": 0.5}, "sweep.ladder_share=0.5 has no meaning"),
        (LR, {"mutate": ["optim.lr"]}, r"sweep.mutate=\['optim.lr'\] has no meaning without sweep.scheduler=pbt"),
        (LR, {"algorithm": "grid"}, "grid cannot try all values of optim.lr"),
        (
            SIZES,
            {"algorithm": "grid", "trials": 6, "first": [{}]},
            r"6 combinations \(2 of model.num_experts, 3 of model.top_k\) beside 1 .*trials=6.*raise sweep.trials",
        ),
        (
            SIZES | {"optim.eps": {"choice": [1, 2], "when": {"model.top_k": 4}}},
            {"algorithm": "grid", "trials": 7},
            r"up to 12 combinations",
        ),
        ({"optim.warmup_steps": {"integers": [1, 10**9]}}, {"algorithm": "grid"}, "1,000,000,000 of optim.warmup"),
        (LR, {"scheduler": "asha", "grace_steps": 1000}, "grace_steps=1000 is not less than train.steps=1000"),
        (LR, {"scheduler": "asha", "grace_steps": 300}, "no multiple of train.eval_every=200.*grace_steps=400"),
        (LR, {"scheduler": "pbt", "algorithm": "optuna"}, "optuna learns nothing with sweep.scheduler=pbt"),
        (LR, {"scheduler": "pbt", "trials": 1}, "sweep.trials=1 .*no other trial.*at least 2"),
        (LR, {"scheduler": "pbt", "mutate": ["optim.eps"]}, "'optim.eps', which is not in sweep.space"),
        (LR | SIZES, {"scheduler": "pbt"}, r"model.top_k cannot change in mid-run.*: sweep.mutate=\[optim.lr\]"),
        (SIZES, {"scheduler": "pbt"}, r"vary a setting that can, one of optim\.\*, .*name it in sweep.mutate"),
        (SIZES, {"scheduler": "pbt", "mutate": ["model.top_k"]}, r"leave it out of sweep.mutate.*optim\.\*"),
    ],
)
def test_algorithm_scheduler_and_space_fit(space: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    refused(space, message, **settings)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], None),
        (["train.eval_every=50", "sweep.metric=loss", "sweep.grace_steps=70"], None),
        (["train.eval_every=30"], None),
        (["train.eval_every=1000"], "train.eval_every=1000 is not less than train.steps=1000"),
        (
            ["sweep.grace_steps=700", "train.eval_every=600"],
            "no multiple of train.eval_every=600.*use train.eval_every=700.",
        ),
    ],
)
def test_trials_are_evaluated_before_the_first_is_ended(overrides: list[str], message: str | None) -> None:
    config = build_config({"sweep": {"space": LR, "scheduler": "asha"}}, overrides)
    if message is None:
        check_sweep(config)
        return
    with pytest.raises(ConfigError, match=message) as error:
        check_sweep(config)
    assert not re.search("sweep.grace_steps=.*sweep.grace_steps", str(error.value)), "that is after the last step"


@pytest.mark.parametrize(
    ("space", "first"),
    [
        ({"optim.lr": {"choice": ["1e-3", 1e-2]}}, []),
        (LR, [{"optim.lr": "1e-3"}]),
        (SIZES | {"optim.eps": {"choice": [1, 2], "when": {"model.top_k": "4"}}}, []),
    ],
)
def test_a_text_is_no_number(space: dict[str, Any], first: list[dict[str, Any]]) -> None:
    refused(space, r"is text.*write (0.001|4); YAML takes 1\.0e-3 for a number", first=first)


def test_what_has_no_meaning_for_trials_is_refused() -> None:
    refused(LR, "sweep.first has 3 trials, more than sweep.trials=2", first=[{}] * 3, trials=2)
    config = build_config({"sweep": {"space": LR}, "train": {"until": 100}})
    with pytest.raises(ConfigError, match=r"train\.until=100 has no meaning in a sweep"):
        check_sweep(config)
