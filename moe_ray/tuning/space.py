"""The search space of a sweep: what it may hold, what is drawn from it, and the settings that a draw means."""

import importlib.util
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from moe_ray.config import Config, build_config, check_setting
from moe_ray.errors import ConfigError
from moe_ray.presets import PRESETS
from moe_ray.sweep_config import Dimension
from moe_ray.tuning.auto.ladder import check_auto

Values = dict[str, Any]
Pick = Callable[[str, Dimension], Any]
# Of the sweep, or without effect on training.
_FIXED_SECTIONS = ("sweep", "serve", "telemetry")
_FIXED = ("train.name", "train.storage", "train.steps", "train.until")
_MUTABLE_MODEL_FIELDS = (
    *("load_balancing_loss_weight", "router_z_loss_weight", "router_jitter"),
    *("expert_bias_update_rate", "capacity_factor"),
)
# Of the way from one end of a range to the other: no whole number.
_INSIDE = (math.sqrt(5) - 1) / 2


def check_sweep(config: Config) -> None:
    """Look for mistakes in `config.sweep` that show before any run begins.

    Raises:
        ConfigError: a setting of the space is unknown or never has one of its values, or algorithm, scheduler and
            space do not fit.
    """
    sweep = config.sweep
    if sweep.auto:
        check_auto(config)
        return
    if not sweep.space:
        raise ConfigError(
            "sweep.space varies nothing.", "name settings, such as {optim.lr: {loguniform: [1.0e-4, 1.0e-2]}}."
        )
    known: list[str] = []
    for name, dimension in sweep.space.items():
        _check_dimension(name, dimension)
        for other, wanted in dimension.when.items():
            if other in sweep.space and other not in known:
                raise ConfigError(
                    f"sweep.space: {name} depends on {other}, which comes after it.", f"put {other} before {name}."
                )
            for value in _alternatives(wanted):
                _check_value(f"the condition of {name}", other, value)
        known.append(name)
    for name, value in (item for first in sweep.first for item in first.items()):
        if name not in sweep.space:
            raise ConfigError(
                f"sweep.first sets {name}, which is not in sweep.space.", f"use some of {', '.join(known)}."
            )
        _check_value("sweep.first", name, value)
    _check_algorithm(config)
    _check_scheduler(config)


def mutable_settings(config: Config) -> tuple[str, ...]:
    """What population-based training changes in mid-run."""
    return config.sweep.mutate or tuple(config.sweep.space)


def draw(config: Config, number: int) -> Values:
    """Values of a trial of a random search: a function of `sweep.seed` and the trial's number alone."""
    generator = random.Random(f"{config.sweep.seed}/{number}")  # nosec B311
    grids = {name: dimension.grid for name, dimension in config.sweep.space.items() if dimension.grid}
    combinations = itertools.product(*grids.values())
    index = number % math.prod(map(len, grids.values()))
    on_grid = dict(zip(grids, next(itertools.islice(combinations, index, None)), strict=True))
    return walk(config, lambda name, of: on_grid[name] if name in on_grid else draw_value(of, generator))


def draw_value(dimension: Dimension, generator: random.Random) -> Any:
    """One value of a dimension."""
    if dimension.bounds is None:
        return generator.choice(dimension.values or ())
    low, high = dimension.bounds
    if dimension.loguniform:
        return min(high, max(low, math.exp(generator.uniform(math.log(low), math.log(high)))))
    return generator.uniform(low, high)


def grid_points(config: Config) -> Iterator[Values]:
    """All combinations of a space whose values can be counted, each once, the last dimension changing fastest."""
    seen: set[str] = set()
    for combination in itertools.product(*(dimension.values or () for dimension in config.sweep.space.values())):
        of = dict(zip(config.sweep.space, combination, strict=True))
        values = walk(config, lambda name, _, of=of: of[name])
        key = json.dumps(values, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield values


def walk(config: Config, pick: Pick) -> Values:
    """Pick a value of each dimension whose condition is met, in the order of the space."""
    values: Values = {}
    for name, dimension in config.sweep.space.items():
        current = ((_value(config, values, other), wanted) for other, wanted in dimension.when.items())
        if all(value in _alternatives(wanted) for value, wanted in current):
            values[name] = pick(name, dimension)
    return values


def with_configured(config: Config, values: Mapping[str, Any]) -> Values:
    """The same with what the configuration says of the other settings in the space."""
    return walk(config, lambda name, _: values.get(name, _value(config, {}, name)))


def resolve(config: Config, values: Mapping[str, Any]) -> Config:
    """The settings of a run with these values.

    Raises:
        ConfigError: they exclude each other.
    """
    tree = config.model_dump(mode="json", exclude_unset=True, exclude={"sweep"})
    if "model.preset" in values:
        # What the configured preset has set is not what the user has.
        preset, model = PRESETS[config.model.preset], tree.get("model", {})
        tree["model"] = {name: value for name, value in model.items() if name not in preset}
    for name, value in values.items():
        section, _, field = name.partition(".")
        tree.setdefault(section, {})[field] = value
    return build_config(tree)


def _value(config: Config, values: Mapping[str, Any], name: str) -> Any:
    section, _, field = name.partition(".")
    value = values.get(name, getattr(getattr(config, section), field))
    return list(value) if isinstance(value, tuple) else value


def _alternatives(wanted: Any) -> list[Any]:
    return list(wanted) if isinstance(wanted, list | tuple) else [wanted]


def _check_dimension(name: str, dimension: Dimension) -> None:
    if name.partition(".")[0] in _FIXED_SECTIONS or name in _FIXED:
        raise ConfigError(
            f"sweep.space varies {name}, which all trials have in common.",
            "vary settings of model, data, parallel or optim, or others of train.",
        )
    values = dimension.values
    if isinstance(values, range):
        values = sorted({*values[:2], values[-1]})
    if dimension.bounds is not None:
        low, high = dimension.bounds
        values = (low, high, low + _INSIDE * (high - low))
    for value in values or ():
        _check_value("sweep.space", name, value)


def _check_value(where: str, name: str, value: Any) -> None:
    try:
        check_setting(name, value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.problem}", error.fix) from None


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
    points = sum(1 for _ in itertools.islice(grid_points(config), sweep.trials + 1))
    if len(sweep.first) + points > sweep.trials:
        raise ConfigError(
            f"the grid of sweep.space has more points than sweep.trials={sweep.trials}.",
            "raise sweep.trials, or use sweep.algorithm=random.",
        )


def _check_scheduler(config: Config) -> None:
    sweep, steps = config.sweep, config.train.steps
    limits = {"asha": ("grace_steps", sweep.grace_steps), "pbt": ("perturb_steps", sweep.perturb_steps)}
    if sweep.scheduler in limits:
        name, value = limits[sweep.scheduler]
        if value >= steps:
            raise ConfigError(
                f"sweep.{name}={value} is not less than train.steps={steps}.",
                f"lower sweep.{name}, or use sweep.scheduler=none.",
            )
    if sweep.scheduler != "pbt":
        return
    for name in mutable_settings(config):
        section, _, field = name.partition(".")
        if name not in sweep.space:
            raise ConfigError(f"sweep.mutate names {name!r}, which is not in sweep.space.", "add it there.")
        if section != "optim" and not (section == "model" and field in _MUTABLE_MODEL_FIELDS):
            allowed = ["optim.*", *(f"model.{field}" for field in _MUTABLE_MODEL_FIELDS)]
            raise ConfigError(
                f"{name} cannot change in mid-run: a checkpoint would not fit, or mean something else.",
                f"leave it out of sweep.mutate, which may name {', '.join(allowed)}.",
            )
