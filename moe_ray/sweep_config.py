"""Settings of sweeps: which settings of a run are varied, how, and what counts as better."""

import itertools
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, PositiveFloat, SerializerFunctionWrapHandler, model_serializer, model_validator

from moe_ray.errors import ConfigError
from moe_ray.section import Count, NonNegativeInt, PositiveInt, Section

# Whole numbers up to it are exact in floating point, too.
_MOST = 2**53
_KINDS = ("choice", "grid", "uniform", "loguniform", "integers")
_CONSTRAINT = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*(\S+)\s*")


class Constraint(NamedTuple):
    """A bound on a reported metric."""

    metric: str
    relation: str
    bound: float

    def __str__(self) -> str:
        return f"{self.metric} {self.relation} {self.bound:g}"


class Dimension(Section):
    """The values that one setting may have: exactly one of the kinds, and perhaps a condition."""

    choice: tuple[Any, ...] | None = Field(None, description="one of these")
    grid: tuple[Any, ...] | None = Field(
        None, description="each of these in turn, in all combinations with other grids"
    )
    uniform: tuple[float, float] | None = Field(None, description="[low, high], evenly")
    loguniform: tuple[float, float] | None = Field(None, description="[low, high], evenly in the logarithm")
    integers: Annotated[tuple[int, ...], Field(min_length=2, max_length=3)] | None = Field(
        None, description="[low, high] or [low, high, step], both ends included"
    )
    when: dict[str, Any] = Field(
        {}, description="varied only where these other settings have this value, or one of these"
    )

    @model_serializer(mode="wrap")
    def _only_what_is_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value not in (None, {})}

    @property
    def kind(self) -> str:
        """Which of the kinds is given."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    @property
    def values(self) -> Sequence[Any] | None:
        """All of them in order, if they can be counted."""
        if self.integers is not None:
            low, high, *step = self.integers
            return range(low, high + 1, *step)
        return self.grid if self.choice is None else self.choice

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of a range of numbers with a fraction."""
        return self.loguniform if self.uniform is None else self.uniform

    def check(self, name: str) -> None:
        """Look for mistakes that are none of the types.

        Raises:
            ConfigError: it has not one kind of values, or no value.
        """
        where = f"sweep.space.{name}"
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"{where} has {' and '.join(given) or 'no kind of values'}.",
                f"give exactly one of {', '.join(_KINDS)}, such as {{choice: [1, 2]}}.",
            )
        where = f"{where}.{self.kind}={list(getattr(self, self.kind))}"
        if self.bounds is not None:
            low, high = self.bounds
            if low >= high or (self.loguniform is not None and low <= 0):
                raise ConfigError(
                    f"{where} is no range.",
                    "give [low, high] with low < high" + (" and low > 0." if self.loguniform else "."),
                )
        elif self.integers is not None and max(map(abs, self.integers)) > _MOST:
            raise ConfigError(f"{where} goes beyond {_MOST:,}.", "give smaller ones.")
        elif self.integers is not None and (min(self.integers[2:], default=1) < 1 or not self.values):
            raise ConfigError(f"{where} holds no value.", "give low <= high, and a step of at least 1.")
        elif not self.values:
            raise ConfigError(f"{where} holds no value.", "give at least one.")


class AutoConfig(Section):
    """AutoML: the model and its training that fit a budget of FLOPs best."""

    auto: bool = Field(
        False,
        description="instead of `space`: pick architecture, learning rate and batch for `budget` by a scaling law "
        "that is fitted to a ladder of `trials` small runs",
    )
    budget: PositiveFloat | None = Field(
        None, description="auto: FLOPs of everything, the ladder and the training that follows it"
    )
    ladder_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.2, description="auto: share of the budget that the ladder takes"
    )


class SweepConfig(AutoConfig):
    """Many runs with different settings, of which the best is found."""

    space: dict[str, Dimension] = Field(
        {}, description="the values to try, by setting: {optim.lr: {loguniform: [1.0e-4, 1.0e-2]}}"
    )
    first: tuple[dict[str, Any], ...] = Field(
        (), description="settings of the first trials; what one does not name stays as configured: [{}]"
    )
    metric: str = Field("val_loss", description="a number that runs log, by which trials are compared")
    mode: Literal["min", "max"] = Field("min", description="which metric is better")
    constraints: tuple[str, ...] = Field(
        (), description="bounds on logged numbers, such as 'load_cv <= 0.3'; trials within them are better"
    )
    algorithm: Literal["random", "grid", "optuna"] = Field(
        "random", description="grid: all combinations; optuna: learns from finished trials (an extra)"
    )
    scheduler: Literal["none", "asha", "pbt"] = Field(
        "none",
        description="asha: ends trials early that are worse than others at the same step; "
        "pbt: worse trials go on from checkpoints of better ones, with other settings",
    )
    trials: Count = Field(16, description="how many; with pbt the population; all combinations of a grid must fit")
    concurrent: Count | Literal["auto"] = Field(
        "auto", description="most trials at once; auto: as many as the cluster has room for"
    )
    seed: NonNegativeInt = Field(0, description="of the values tried; that of the runs is train.seed")
    retries: NonNegativeInt = Field(1, description="how often a failed trial is tried again")
    grace_steps: PositiveInt | None = Field(
        None,
        description="asha: steps before the first trial may be ended, a multiple of train.eval_every; "
        "default: the first evaluation",
    )
    reduction_factor: Annotated[int, Field(ge=2, le=64)] = Field(
        3, description="asha: one of so many trials goes on at grace_steps and at each multiple by this factor"
    )
    perturb_steps: PositiveInt = Field(100, description="pbt: steps between changes")
    mutate: tuple[str, ...] = Field((), description="pbt: what is changed in mid-run; default: all of the space")
    replaced_fraction: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.25, description="pbt: share of the trials that is replaced, and of those that replace them"
    )
    resample_probability: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="pbt: how often a setting is drawn anew instead of changed a little"
    )

    @property
    def bounds(self) -> tuple[Constraint, ...]:
        """The constraints, parsed."""
        found = (_CONSTRAINT.fullmatch(text) for text in self.constraints)
        return tuple(Constraint(match[1], match[2], float(match[3])) for match in found if match)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, dimension in self.space.items():
            dimension.check(name)
        for text in self.constraints:
            match = _CONSTRAINT.fullmatch(text)
            if not match or not _is_number(match[3]):
                raise ConfigError(
                    f"sweep.constraints has {text!r}, which is no bound on a metric.",
                    "write for example 'load_cv <= 0.3', with one of <=, >=, <, >.",
                )
        for least, most in itertools.permutations(self.bounds, 2):
            if _exclude(least, most):
                raise ConfigError(
                    f"sweep.constraints has '{least}' and '{most}', which no trial can meet.",
                    f"leave one of them out, or let the bounds of {least.metric} leave room.",
                )
        if self.algorithm == "optuna" and self.scheduler == "pbt":
            raise ConfigError(
                "sweep.algorithm=optuna learns nothing with sweep.scheduler=pbt, where all trials begin at once.",
                "use sweep.algorithm=random.",
            )
        return self


def _exclude(least: Constraint, most: Constraint) -> bool:
    """Whether no number is above the one bound and below the other."""
    if least.metric != most.metric or least.relation not in (">", ">=") or most.relation not in ("<", "<="):
        return False
    is_open = least.relation == ">" or most.relation == "<"
    return least.bound > most.bound or (least.bound == most.bound and is_open)


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
