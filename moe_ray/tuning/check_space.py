"""Mistakes in the space of a sweep: what is varied, when, and with which values the first trials begin."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from moe_ray.config import Config, check_setting
from moe_ray.errors import ConfigError
from moe_ray.explain import nearest
from moe_ray.presets import PRESETS
from moe_ray.sweep_config import Dimension
from moe_ray.telemetry.samples import check_metric
from moe_ray.tuning.space import Values, alternatives, configured, contains, is_met, with_configured

# Of the sweep, or without effect on training.
_FIXED_SECTIONS = ("sweep", "serve", "telemetry")
_FIXED = ("train.name", "train.storage", "train.steps", "train.until")
# Of the way from one end of a range to the other: no whole number.
_INSIDE = (math.sqrt(5) - 1) / 2
# A value that no condition names.
_ANOTHER = object()


def check_space(config: Config) -> None:
    """Look for mistakes in `sweep.space` and `sweep.first`.

    Raises:
        ConfigError: a setting is unknown, fixed, or never has one of its values, or is never varied.
    """
    space = config.sweep.space
    if not space:
        raise ConfigError(
            "sweep.space varies nothing.", "name settings, such as {optim.lr: {loguniform: [1.0e-4, 1.0e-2]}}."
        )
    for name, dimension in space.items():
        _check_dimension(name, dimension)
    known: list[str] = []
    for name, dimension in space.items():
        for other, wanted in dimension.when.items():
            _check_condition(space, known, name, other)
            if not alternatives(wanted):
                raise ConfigError(
                    f"sweep.space.{name}.when names no value of {other}, so that {name} would never be varied.",
                    f"give the values of {other} with which it is varied, or leave {other} out.",
                )
            for value in alternatives(wanted):
                _check_value(f"sweep.space.{name}.when", other, value)
        known.append(name)
    _check_reached(config)
    for number, values in enumerate(config.sweep.first):
        _check_first(config, f"sweep.first[{number}]", values)


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


def _check_condition(space: Mapping[str, Dimension], known: Iterable[str], name: str, other: str) -> None:
    """A condition is met or not by settings that come before."""
    if name == other:
        raise ConfigError(f"sweep.space: {name} depends on itself.", f"leave {name} out of its `when`.")
    if other not in space:
        _check_no_preset(space, name, other)
        return
    if other in known:
        return
    if name in _conditions(space, other):
        raise ConfigError(
            f"sweep.space: {name} and {other} depend on each other.",
            "leave one of them out of the other's `when`.",
        )
    raise ConfigError(
        f"sweep.space: {name} depends on {other}, which comes after it.", f"put {other} before {name}."
    )


def _check_no_preset(space: Mapping[str, Dimension], name: str, other: str) -> None:
    """What a varied preset sets has no value of its own that a condition could look at."""
    section, _, field = other.partition(".")
    varied = space.get("model.preset")
    if section != "model" or varied is None:
        return
    for preset in varied.values or ():
        if field in PRESETS[preset]:
            raise ConfigError(
                f"sweep.space.{name}.when looks at {other}, which model.preset={preset} decides.",
                f"write when: {{model.preset: …}} with presets for which {name} is varied, or vary {other}, too.",
            )


def _check_reached(config: Config) -> None:
    """Each dimension is varied in some trial: all combinations of what conditions look at are tried."""
    named = [other for dimension in config.sweep.space.values() for other in dimension.when]
    trials: list[Values] = [{}]
    for name, dimension in config.sweep.space.items():
        if not all(config.model.is_known(field) for field in _model_fields(dimension.when)):
            return
        varied = [values for values in trials if is_met(config, values, dimension)]
        if not varied:
            stands = {other: configured(config, other) for other in dimension.when}
            raise ConfigError(
                f"sweep.space.{name} is never varied: no trial meets its `when`, {dimension.when}.",
                f"leave it out, or vary {' and '.join(stands)} over such values, too (as configured: {stands}).",
            )
        if name in named:
            others = [values for values in trials if not is_met(config, values, dimension)]
            trials = others + [{**values, name: value} for values in varied for value in _looked_at(config, name)]


def _looked_at(config: Config, name: str) -> list[Any]:
    """Values that a setting may have, of those that conditions name; and one that none does."""
    sweep, dimension = config.sweep, config.sweep.space[name]
    wanted = [value for of in sweep.space.values() if name in of.when for value in alternatives(of.when[name])]
    begun = [first[name] if name in first else configured(config, name) for first in sweep.first]
    # No draw from a range of fractions hits a point.
    drawn = [value for value in wanted if dimension.bounds is None and contains(dimension, value)]
    return [value for value in wanted if value in drawn or value in begun] + [_ANOTHER]


def _model_fields(names: Iterable[str]) -> list[str]:
    return [field for section, _, field in (name.partition(".") for name in names) if section == "model"]


def _conditions(space: Mapping[str, Dimension], name: str) -> set[str]:
    """What a dimension depends on, and what that depends on, and so on."""
    found, new = set(), [name]
    while new:
        of = space.get(new.pop())
        added = set() if of is None else set(of.when) - found
        found |= added
        new += added
    return found


def _check_first(config: Config, where: str, values: Mapping[str, Any]) -> None:
    space = config.sweep.space
    for name, value in values.items():
        if name not in space:
            raise ConfigError(
                f"{where} sets {name}, which is not in sweep.space.", f"did you mean {nearest(name, [*space])!r}?"
            )
        _check_value(where, name, value)
        if not contains(space[name], value):
            kind = space[name].kind
            raise ConfigError(
                f"{where}: {name}={value!r} is not in sweep.space, where it is {kind} "
                f"{list(getattr(space[name], kind))}.",
                "use a value from there, or widen that.",
            )
    for name in values.keys() - with_configured(config, values).keys():
        raise ConfigError(
            f"{where} sets {name}, which is varied only when {space[name].when}.",
            f"leave {name} out, or set what it depends on.",
        )


def _check_value(where: str, name: str, value: Any) -> None:
    section, _, field = name.partition(".")
    if section in Config.model_fields and not field:
        raise ConfigError(f"{where} names {name!r}, a whole section.", f"name its settings, such as {name}.FIELD.")
    try:
        read = check_setting(name, value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.problem}", error.fix) from None
    if name == "checkpoint.best_metric":
        check_metric(name, value)
    # Values are compared as they are written.
    if isinstance(value, str) and not isinstance(read, str):
        raise ConfigError(
            f"{where}: {name}={value!r} is text.",
            f"write {read!r}; YAML takes 1.0e-3 for a number and 1e-3 for a text.",
        )
