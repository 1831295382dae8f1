"""The ladder: small runs at four scales of compute, of which the law is fitted."""

import math
from typing import Any

import numpy as np

from moe_ray.config import Config
from moe_ray.errors import ConfigError
from moe_ray.sweep_config import SweepConfig
from moe_ray.tuning.auto.shapes import (
    Plan,
    Shape,
    batches,
    fewest_steps,
    most_flops_per_token,
    run_values,
    shapes,
    steps_of,
)

RUNGS = 4
_RATIO = 2.0
# Of the runs, from the smallest scale to the largest; the small ones are cheap.
_SHARES = (0.36, 0.28, 0.2, 0.16)
FEWEST_RUNS = 12
# Tokens a parameter of equal shares of compute for size and data (Hoffmann et al. 2022), and a range around it.
_TOKENS_PER_PARAMETER = 20.0
_WIDTHS = 3
# The steps of the smallest run are a whole number.
_ROUNDING = 1.01
_LR_SPAN = math.log(4)
# Top-k, experts, shared experts, width, batch and learning rate.
_DRAWN = 6


def ladder(config: Config) -> list[Plan]:
    """Its runs, which cost `sweep.ladder_share` of `sweep.budget` at most, the smallest scale first.

    Widths, experts, rates and batches are a Latin hypercube (`sweep.seed`): on each scale every one of them is
    covered evenly.

    Raises:
        ConfigError: the budget is too small, or the configuration leaves nothing to choose.
    """
    counts = _counts(config)
    scales = rung_flops(config)
    choices = shapes(config, most_flops_per_token(config, scales[-1]))
    plans = []
    for flops, count, seed in zip(scales, counts, range(RUNGS), strict=True):
        rng = np.random.default_rng((config.sweep.seed, seed))
        order = rng.permuted(np.tile(np.arange(count), (_DRAWN, 1)), axis=1).T
        draws = (order + rng.random(order.shape)) / count
        plans += [_plan(config, choices, flops, draw) for draw in draws]
    return plans


def ladder_values(config: Config) -> list[dict[str, Any]]:
    """Settings of each run, for a sweep; it is evaluated and saved once."""
    return [
        run_values(config, plan) | {"train.eval_every": plan.steps, "checkpoint.every": plan.steps}
        for plan in ladder(config)
    ]


def check_auto(config: Config) -> None:
    """Look for mistakes in `config.sweep` with `sweep.auto` that show before any run begins.

    Raises:
        ConfigError: a setting of sweeps has no meaning here, the model is given, or the budget is too small.
    """
    default, sweep = SweepConfig(), config.sweep
    for name in ("space", "first", "metric", "mode", "constraints", "algorithm", "scheduler", "mutate"):
        value = getattr(sweep, name)
        if value != getattr(default, name):
            shown = f"={value!r}" if isinstance(value, str) else ""
            raise ConfigError(f"sweep.{name}{shown} has no meaning with sweep.auto=true.", "leave it out.")
    if config.model.init_from or config.model.upcycle_from:
        raise ConfigError(
            "sweep.auto=true picks an architecture, and model.init_from or model.upcycle_from gives one.",
            "leave it out, or vary other settings with sweep.space.",
        )
    rung_flops(config)


def rung_flops(config: Config) -> list[float]:
    """FLOPs of a run on each rung, ascending.

    Raises:
        ConfigError: the budget is missing or too small.
    """
    counts = _counts(config)
    units = sum(count * _RATIO**rung for rung, count in enumerate(counts))
    cheapest = shapes(config, 0)
    if not cheapest:
        raise ConfigError(
            "sweep.auto finds no architecture that the other settings allow.",
            "set parallel.ep=auto, and leave out settings of model that hold for one number of experts only.",
        )
    smallest_run = cheapest[0].flops_per_token / most_flops_per_token(config, 1.0)
    smallest = smallest_run * units / config.sweep.ladder_share * _ROUNDING
    budget = config.sweep.budget
    if budget is None or budget < smallest:
        raise ConfigError(
            f"sweep.budget={'null' if budget is None else f'{budget:.3g}'} does not pay for a ladder of "
            f"{sum(counts)} runs.",
            f"with these settings it is at least {_rounded_up(smallest):.3g} FLOPs; fewer sweep.trials or a "
            "smaller train.global_batch lower that.",
        )
    return [config.sweep.ladder_share * budget / units * _RATIO**rung for rung in range(RUNGS)]


def _counts(config: Config) -> list[int]:
    runs = config.sweep.trials
    if runs < FEWEST_RUNS:
        raise ConfigError(
            f"sweep.trials={runs} are too few to fit a scaling law.", f"use at least {FEWEST_RUNS}; 24 tell more."
        )
    counts = [max(2, round(runs * share)) for share in _SHARES]
    return [runs - sum(counts[1:]), *counts[1:]]


def _plan(config: Config, choices: list[Shape], flops: float, draw: np.ndarray) -> Plan:
    """A run of about so many FLOPs; `draw` [6] is even in [0, 1)."""
    most = most_flops_per_token(config, flops)
    fits = [shape for shape in choices if shape.flops_per_token <= most]
    shape = _pick(fits, flops, draw)
    sizes = [
        size for size in batches(config) if steps_of(config, shape, flops, size) >= fewest_steps(config, size)
    ]
    batch = sizes[int(draw[4] * len(sizes))]
    lr = config.optim.lr * math.exp((2 * draw[5] - 1) * _LR_SPAN)
    return Plan(shape, lr, batch, steps_of(config, shape, flops, batch))


def _pick(fits: list[Shape], flops: float, draw: np.ndarray) -> Shape:
    """First the experts, so that each choice is tried equally often, then a width near the optimum."""
    for name, at in (("top_k", 0), ("num_experts", 1), ("num_shared_experts", 2)):
        values = sorted({getattr(shape.model, name) for shape in fits})
        chosen = values[int(draw[at] * len(values))]
        fits = [shape for shape in fits if getattr(shape.model, name) == chosen]

    def distance(shape: Shape) -> float:
        tokens = flops / shape.flops_per_token
        return abs(math.log(tokens / shape.active / _TOKENS_PER_PARAMETER))

    near = sorted(fits, key=distance)[:_WIDTHS]
    return near[int(draw[3] * len(near))]


def _rounded_up(value: float) -> float:
    """To three digits."""
    unit = 10 ** (math.floor(math.log10(value)) - 2)
    return math.ceil(value / unit) * unit
