"""Mistakes in the settings of a sweep that show before any run begins."""

import importlib.util
import itertools
import math
from collections.abc import Mapping

from moe_ray.config import Config
from moe_ray.errors import ConfigError
from moe_ray.sweep_config import AutoConfig, SweepConfig
from moe_ray.telemetry.samples import EVALUATED, check_metric
from moe_ray.tuning.auto.ladder import check_auto
from moe_ray.tuning.check_space import check_space
from moe_ray.tuning.space import count_values, grace_steps, grid_points, mutable_settings

_MUTABLE_MODEL_FIELDS = (
    *("load_balancing_loss_weight", "router_z_loss_weight", "router_jitter"),
    *("expert_bias_update_rate", "capacity_factor"),
)


def check_sweep(config: Config) -> None:
    """Look for mistakes in `config.sweep` that show before any run begins.

    Raises:
        ConfigError: a setting of the space is unknown or never has one of its values, runs do not log a metric, or
            algorithm, scheduler and space do not fit.
    """
    sweep = config.sweep
    check_metric("checkpoint.best_metric", config.checkpoint.best_metric)
    if sweep.auto:
        check_auto(config)
        return
    for name in sorted(AutoConfig.model_fields):
        _check_meaning(sweep, name, "sweep.auto=true")
    if config.train.until is not None:
        raise ConfigError(
            f"train.until={config.train.until} has no meaning in a sweep, whose trials end at train.steps.",
            "leave it out.",
        )
    check_space(config)
    if len(sweep.first) > sweep.trials:
        raise ConfigError(
            f"sweep.first has {len(sweep.first)} trials, more than sweep.trials={sweep.trials}.", "raise that."
        )
    check_metric("sweep.metric", sweep.metric)
    for bound in sweep.bounds:
        check_metric("sweep.constraints", bound.metric)
    _check_algorithm(config)
    _check_scheduler(config)


def _check_meaning(sweep: SweepConfig, name: str, needed: str) -> None:
    """What has an effect only beside another setting."""
    value = getattr(sweep, name)
    if value != SweepConfig.model_fields[name].default:
        shown = list(value) if isinstance(value, tuple) else value
        raise ConfigError(
            f"sweep.{name}={shown!r} has no meaning without {needed}.", f"leave it out, or set {needed}."
        )


def _check_algorithm(config: Config) -> None:
    sweep = config.sweep
    if sweep.algorithm == "optuna" and importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "sweep.algorithm=optuna needs Optuna, which is not installed.", "pip install 'moe_ray[optuna]'."
        )
    if sweep.algorithm != "grid":
        return
    ranges = [name for name, dimension in sweep.space.items() if dimension.values is None]
    if ranges:
        raise ConfigError(
            f"sweep.algorithm=grid cannot try all values of {', '.join(ranges)}.",
            "give choice, grid or integers, or use sweep.algorithm=random.",
        )
    counts = {name: count_values(dimension) for name, dimension in sweep.space.items()}
    # What has too many values by itself cannot be counted out.
    if max(counts.values()) > sweep.trials or len(sweep.first) + _count_points(config) > sweep.trials:
        _refuse_grid(sweep, counts)


def _count_points(config: Config) -> int:
    """Of the grid, or one more than there may be trials."""
    return sum(1 for _ in itertools.islice(grid_points(config), config.sweep.trials + 1))


def _refuse_grid(sweep: SweepConfig, counts: Mapping[str, int]) -> None:
    whole = math.prod(counts.values())
    most = "up to " if any(dimension.when for dimension in sweep.space.values()) else ""
    factors = ", ".join(f"{count:,} of {name}" for name, count in counts.items())
    beside = f" beside {len(sweep.first)} of sweep.first" if sweep.first else ""
    raise ConfigError(
        f"the grid of sweep.space has {most}{whole:,} combinations ({factors}){beside}, more than "
        f"sweep.trials={sweep.trials}.",
        "give fewer values, raise sweep.trials, or use sweep.algorithm=random.",
    )


def _check_scheduler(config: Config) -> None:
    sweep, steps = config.sweep, config.train.steps
    grace = "train.eval_every" if sweep.grace_steps is None else "sweep.grace_steps"
    limits = {"asha": (grace, grace_steps(config)), "pbt": ("sweep.perturb_steps", sweep.perturb_steps)}
    if sweep.scheduler in limits:
        name, value = limits[sweep.scheduler]
        if value >= steps:
            raise ConfigError(
                f"{name}={value} is not less than train.steps={steps}: {sweep.scheduler} would compare no trials.",
                f"lower {name}, or use sweep.scheduler=none.",
            )
    if sweep.scheduler == "asha":
        _check_evaluations(config)
    if sweep.scheduler == "pbt":
        _check_population(config)
    else:
        _check_meaning(sweep, "mutate", "sweep.scheduler=pbt")


def _check_evaluations(config: Config) -> None:
    """Trials are compared at `sweep.grace_steps`, where they must have been evaluated."""
    sweep, every = config.sweep, config.train.eval_every
    if sweep.grace_steps is not None and sweep.metric in EVALUATED and sweep.grace_steps % every:
        later = math.ceil(sweep.grace_steps / every) * every
        raise ConfigError(
            f"sweep.grace_steps={sweep.grace_steps} is no multiple of train.eval_every={every}: trials are not "
            "evaluated at the step where the first may be ended.",
            (f"use sweep.grace_steps={later}, or " if later < config.train.steps else "use ")
            + f"train.eval_every={sweep.grace_steps}.",
        )


def _check_population(config: Config) -> None:
    sweep = config.sweep
    if sweep.trials < 2:
        raise ConfigError(
            "sweep.trials=1 with sweep.scheduler=pbt leaves no other trial to take over from.",
            "use at least 2, better 8, or sweep.scheduler=none.",
        )
    if unknown := [name for name in sweep.mutate if name not in sweep.space]:
        raise ConfigError(f"sweep.mutate names {unknown[0]!r}, which is not in sweep.space.", "add it there.")
    fixed = [name for name in mutable_settings(config) if not _is_mutable(name)]
    if not fixed:
        return
    allowed = ", ".join(["optim.*", *(f"model.{field}" for field in _MUTABLE_MODEL_FIELDS)])
    rest = [name for name in sweep.space if _is_mutable(name)]
    if sweep.mutate:
        fix = f"leave it out of sweep.mutate, which may name {allowed}."
    elif rest:
        fix = f"name what may change: sweep.mutate=[{', '.join(rest)}]."
    else:
        fix = f"vary a setting that can, one of {allowed}, and name it in sweep.mutate."
    raise ConfigError(
        f"{', '.join(fixed)} cannot change in mid-run: a checkpoint would not fit, or mean something else.", fix
    )


def _is_mutable(name: str) -> bool:
    section, _, field = name.partition(".")
    return section == "optim" or (section == "model" and field in _MUTABLE_MODEL_FIELDS)
