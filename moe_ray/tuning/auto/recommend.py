"""What the law of a ladder recommends for the rest of the budget, and how sure that is.

Shapes: M candidates, R samples of the law.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_ray.config import Config
from moe_ray.errors import TrainingError
from moe_ray.tuning.auto.ladder import FEWEST_RUNS
from moe_ray.tuning.auto.law import Law, Points, fit_law
from moe_ray.tuning.auto.shapes import (
    Plan,
    Shape,
    batches,
    fewest_steps,
    most_flops_per_token,
    points_of,
    run_values,
    shape_of,
    shapes,
    steps_of,
)
from moe_ray.tuning.space import resolve
from moe_ray.tuning.trials import Trial

_SURE = 0.8
_FAR = 100
_TOP_RUNG = 0.75
_INTERVAL = (0.05, 0.95)
_DECISIONS: dict[str, Callable[[Plan], int]] = {
    "model.dim": lambda plan: plan.shape.model.dim,
    "model.top_k": lambda plan: plan.shape.model.top_k,
    "model.num_experts": lambda plan: plan.shape.model.num_experts,
    "model.num_shared_experts": lambda plan: plan.shape.model.num_shared_experts,
    "train.global_batch": lambda plan: plan.batch,
}


@dataclass(frozen=True)
class Estimate:
    """A loss in nats: its middle, and the ends of the interval that holds 90%."""

    middle: float
    low: float
    high: float

    @classmethod
    def of(cls, values_R: np.ndarray) -> "Estimate":
        """Median and interval of samples."""
        return cls(float(np.median(values_R)), *np.quantile(values_R, _INTERVAL).tolist())

    def __str__(self) -> str:
        return f"{self.middle:.3f} (90%: {self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Decision:
    """One choice, next to the best with another value.

    Attributes:
        setting: its name.
        value, other: chosen, and that of the best alternative; None if there is none.
        sure: share of the samples of the law in which the choice is better than the alternative.
        gain: by how much the alternative's loss is higher.
    """

    setting: str
    value: int
    other: int | None
    sure: float
    gain: Estimate | None


@dataclass(frozen=True)
class Check:
    """A run of the ladder's largest scale, predicted by the law of the smaller ones alone."""

    trial: int
    measured: float
    predicted: Estimate


@dataclass(frozen=True)
class Recommendation:
    """The model to train, and how sure it is.

    Attributes:
        values: its settings, as of a trial.
        label: what it is, in words.
        flops, tokens: of its training.
        active: parameters that a token meets.
        loss: predicted, a run's noise included.
        lr: the best learning rate.
        decisions: the choices, each by itself.
        configured: loss of the configured architecture at the same FLOPs, with its best batch and rate; None if
            so few steps would be left that the law says nothing.
        better: share of the samples in which the choice beats it.
        extrapolation: its FLOPs over those of the largest run of the ladder.
        checks: the ladder's largest runs, predicted by the smaller ones.
        law: parameters by name: most probable value and interval.
        warnings: what the ladder could not tell.
    """

    values: dict[str, Any]
    label: str
    flops: float
    tokens: int
    active: int
    loss: Estimate
    lr: Estimate
    decisions: list[Decision]
    configured: Estimate | None
    better: float | None
    extrapolation: float
    checks: list[Check]
    law: dict[str, tuple[float, float, float]]
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ladder:
    """The finished runs, the law that fits them, and what it may be asked about."""

    trials: list[Trial]
    points: Points
    losses: np.ndarray
    law: Law
    shapes: list[Shape]


def fit_ladder(config: Config, trials: Sequence[Trial]) -> Ladder:
    """Fit the law to what has finished.

    Raises:
        TrainingError: fewer than twelve runs have finished.
    """
    done = [trial for trial in trials if trial.status == "finished" and _loss(trial) is not None]
    if len(done) < FEWEST_RUNS:
        raise TrainingError(
            f"{len(done)} runs of the ladder have finished, too few of {len(trials)} to fit a law.",
            "sweep.html has the reasons of the others; set another train.name after mending them.",
        )
    plans = [_plan_of(config, trial) for trial in done]
    points, losses = points_of(config, plans), np.array([_loss(trial) for trial in done])
    law = fit_law(points, losses, seed=config.sweep.seed)
    choices = shapes(config, most_flops_per_token(config, model_flops(config)))
    return Ladder(done, points, losses, law, choices)


def model_flops(config: Config) -> float:
    """What the ladder leaves of the budget."""
    assert config.sweep.budget is not None
    return config.sweep.budget * (1 - config.sweep.ladder_share)


def recommend(config: Config, ladder: Ladder) -> Recommendation:
    """The best model for what the ladder has left of the budget."""
    flops, law, spread = model_flops(config), ladder.law, np.random.default_rng(config.sweep.seed)
    plans = candidates(config, law, flops, ladder.shapes)
    loss_RM = np.exp(law.predict(points_of(config, plans)))
    chosen = int(loss_RM.mean(axis=0).argmin())
    plan = plans[chosen]
    noise_R = np.exp(law.noise_R * spread.standard_normal(len(loss_RM)))
    lr_R = np.exp(law.optimum(math.log(flops))[0])
    configured, better = _configured(config, law, flops, loss_RM[:, chosen])
    found = Recommendation(
        values=run_values(config, plan),
        label=plan.shape.label,
        flops=_flops(config, plan),
        tokens=plan.steps * plan.batch * config.data.sequence_length,
        active=plan.shape.active,
        loss=Estimate.of(loss_RM[:, chosen] * noise_R),
        lr=Estimate(plan.lr, *np.quantile(lr_R, _INTERVAL).tolist()),
        decisions=[_decision(name, of, plans, chosen, loss_RM) for name, of in _DECISIONS.items()],
        configured=configured,
        better=better,
        extrapolation=flops / float(np.exp(ladder.points.flops.max())),
        checks=_checks(config, ladder),
        law=law.parameters(),
    )
    found.warnings.extend(_warnings(config, ladder, plan, found))
    return found


def candidates(config: Config, law: Law, flops: float, choices: Sequence[Shape]) -> list[Plan]:
    """Architectures with all batches for so many FLOPs, at the most probable best learning rate."""
    lr = float(np.exp(law.optimum(math.log(flops))[0].mean()))
    plans = [
        Plan(shape, lr, batch, steps_of(config, shape, flops, batch))
        for shape in choices
        for batch in batches(config)
    ]
    return [plan for plan in plans if plan.steps >= fewest_steps(config, plan.batch)]


def _configured(
    config: Config, law: Law, flops: float, chosen_R: np.ndarray
) -> tuple[Estimate | None, float | None]:
    plans = candidates(config, law, flops, [shape_of(config, {})])
    if not plans:
        return None, None
    loss_RM = np.exp(law.predict(points_of(config, plans)))
    best_R = loss_RM[:, loss_RM.mean(axis=0).argmin()]
    return Estimate.of(best_R), float((chosen_R < best_R).mean())


def _decision(
    setting: str, of: Callable[[Plan], int], plans: list[Plan], chosen: int, loss_RM: np.ndarray
) -> Decision:
    """The choice next to the best candidate that has another value there."""
    differs_M = np.array([of(plan) != of(plans[chosen]) for plan in plans])
    if not differs_M.any():
        return Decision(setting, of(plans[chosen]), None, 1.0, None)
    other = int(np.where(differs_M, loss_RM.mean(axis=0), np.inf).argmin())
    gain_R = loss_RM[:, other] - loss_RM[:, chosen]
    return Decision(setting, of(plans[chosen]), of(plans[other]), float((gain_R > 0).mean()), Estimate.of(gain_R))


def _checks(config: Config, ladder: Ladder) -> list[Check]:
    """The largest runs predicted by the smaller ones."""
    flops_N = np.exp(ladder.points.flops)
    top_N = flops_N >= _TOP_RUNG * flops_N.max()
    if (~top_N).sum() < FEWEST_RUNS // 2:
        return []
    law = fit_law(ladder.points.take(~top_N), ladder.losses[~top_N], seed=config.sweep.seed)
    noise = law.noise_R[:, None] * np.random.default_rng(config.sweep.seed).standard_normal((len(law.noise_R), 1))
    loss_RM = np.exp(law.predict(ladder.points.take(top_N)) + noise)
    return [
        Check(ladder.trials[row].number, float(ladder.losses[row]), Estimate.of(loss_R))
        for row, loss_R in zip(np.flatnonzero(top_N).tolist(), loss_RM.T, strict=True)
    ]


def _warnings(config: Config, ladder: Ladder, plan: Plan, found: Recommendation) -> list[str]:
    told = [
        f"The ladder cannot tell {item.setting}={item.value} from {item.other}: it is the better one with a "
        f"probability of {item.sure:.0%}, by about {item.gain.middle:.3f} nats."
        for item in found.decisions
        if item.other is not None and item.gain is not None and item.sure < _SURE
    ]
    if found.extrapolation > _FAR:
        told.append(f"The model has {found.extrapolation:.0f} times the FLOPs of the largest run of the ladder.")
    outside = [
        check for check in found.checks if not check.predicted.low <= check.measured <= check.predicted.high
    ]
    if len(outside) > max(1, len(found.checks) // 3):
        told.append(
            f"{len(outside)} of the {len(found.checks)} largest runs lie outside of the intervals that the "
            "smaller ones predict: the law does not hold here, and the intervals are too narrow."
        )
    tried = np.exp([ladder.points.lr.min(), ladder.points.lr.max()])
    if not tried[0] <= plan.lr <= tried[1]:
        told.append(
            f"The learning rate {plan.lr:.2g} is outside of those tried, {tried[0]:.2g} to {tried[1]:.2g}."
        )
    sizes = batches(config)
    if len(sizes) > 1 and plan.batch in (sizes[0], sizes[-1]):
        told.append(f"The batch {plan.batch} is at the end of those tried; a better one may lie beyond.")
    return told


def _plan_of(config: Config, trial: Trial) -> Plan:
    """The run that a trial was."""
    of = resolve(config, trial.values)
    return Plan(shape_of(of, {}), of.optim.lr, of.train.global_batch, of.train.steps)


def _flops(config: Config, plan: Plan) -> float:
    return float(plan.shape.flops_per_token) * plan.steps * plan.batch * config.data.sequence_length


def _loss(trial: Trial) -> float | None:
    value = trial.metrics.get("val_loss")
    return value if value is not None and 0 < value < math.inf else None
