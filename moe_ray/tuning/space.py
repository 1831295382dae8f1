"""The search space of a sweep: what is drawn from it, and the settings that a draw means."""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from moe_ray.config import Config, build_config
from moe_ray.presets import PRESETS
from moe_ray.section import Section
from moe_ray.sweep_config import Dimension

Values = dict[str, Any]
Pick = Callable[[str, Dimension], Any]


def mutable_settings(config: Config) -> tuple[str, ...]:
    """What population-based training changes in mid-run."""
    return config.sweep.mutate or tuple(config.sweep.space)


def grace_steps(config: Config) -> int:
    """Steps before ASHA may end the first trial."""
    return config.sweep.grace_steps or config.train.eval_every


def draw(config: Config, number: int) -> Values:
    """Values of a trial of a random search: a function of `sweep.seed` and the trial's number alone."""
    generator = random.Random(f"{config.sweep.seed}/{number}")  # nosec B311
    grids = {name: dimension.grid for name, dimension in config.sweep.space.items() if dimension.grid}
    combinations = itertools.product(*grids.values())
    index = number % math.prod(map(len, grids.values()))
    on_grid = dict(zip(grids, next(itertools.islice(combinations, index, None)), strict=True))
    return walk(config, lambda name, of: on_grid[name] if name in on_grid else draw_value(of, generator))


def count_values(dimension: Dimension) -> int:
    """How many different ones a dimension has that is no range of fractions."""
    values = dimension.values or ()
    return len(values) if isinstance(values, range) else sum(1 for _ in _distinct(values))


def draw_value(dimension: Dimension, generator: random.Random) -> Any:
    """One value of a dimension."""
    if dimension.bounds is None:
        return generator.choice(dimension.values or ())
    low, high = dimension.bounds
    if dimension.loguniform:
        return min(high, max(low, math.exp(generator.uniform(math.log(low), math.log(high)))))
    return generator.uniform(low, high)


def contains(dimension: Dimension, value: Any) -> bool:
    """Whether a dimension can give a value that its setting may have."""
    if dimension.bounds is not None:
        low, high = dimension.bounds
        return isinstance(value, int | float) and low <= value <= high
    if dimension.integers is None:
        return value in (dimension.values or ())
    # A range looks for what is no `int` one by one.
    is_whole = isinstance(value, int | float) and float(value).is_integer()
    return is_whole and int(value) in (dimension.values or ())


def grid_points(config: Config) -> Iterator[Values]:
    """All combinations of a space whose values can be counted, each once, the last dimension changing fastest."""

    def extend(values: Values, rest: Sequence[tuple[str, Dimension]]) -> Iterator[Values]:
        if not rest:
            yield values
            return
        (name, dimension), *later = rest
        if not is_met(config, values, dimension):
            yield from extend(values, later)
            return
        for value in _distinct(dimension.values or ()):
            yield from extend(values | {name: value}, later)

    return extend({}, list(config.sweep.space.items()))


def walk(config: Config, pick: Pick) -> Values:
    """Pick a value of each dimension whose condition is met, in the order of the space."""
    values: Values = {}
    for name, dimension in config.sweep.space.items():
        if is_met(config, values, dimension):
            values[name] = pick(name, dimension)
    return values


def with_configured(config: Config, values: Mapping[str, Any]) -> Values:
    """The same with what the configuration says of the other settings in the space."""
    return walk(config, lambda name, _: values.get(name, configured(config, name)))


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


def alternatives(wanted: Any) -> list[Any]:
    """The values with one of which a condition is met."""
    return list(wanted) if isinstance(wanted, list | tuple) else [wanted]


def configured(config: Config, name: str) -> Any:
    """The value of a setting where nothing varies it."""
    section, _, field = name.partition(".")
    value = getattr(getattr(config, section), field)
    if isinstance(value, Section):
        return value.model_dump(mode="json", exclude_unset=True)
    return list(value) if isinstance(value, tuple) else value


def is_met(config: Config, values: Mapping[str, Any], dimension: Dimension) -> bool:
    """Whether a dimension is varied beside these values of those before it."""
    current = {name: values[name] if name in values else configured(config, name) for name in dimension.when}
    return all(current[name] in alternatives(wanted) for name, wanted in dimension.when.items())


def _distinct(values: Iterable[Any]) -> Iterator[Any]:
    seen: set[str] = set()
    for value in values:
        key = json.dumps(value, sort_keys=True)
        if key not in seen:
            seen.add(key)
            yield value
