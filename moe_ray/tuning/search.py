"""Proposes the trials of a sweep, one after another."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from moe_ray.config import Config
from moe_ray.errors import ConfigError
from moe_ray.sweep_config import Dimension
from moe_ray.tuning.auto.ladder import ladder_values
from moe_ray.tuning.objective import score
from moe_ray.tuning.space import Values, contains, draw, grid_points, resolve, walk, with_configured
from moe_ray.tuning.trials import Trial

if TYPE_CHECKING:
    import optuna

_IMPOSSIBLE = 1e12


def new_trial(config: Config, number: int, values: Values) -> Trial:
    """A trial that has not begun; infeasible if its values exclude each other."""
    run = f"trial-{number:03d}"
    try:
        of = resolve(config, values)
    except ConfigError as error:
        return Trial(number, run, values, "infeasible", str(error), seed=config.train.seed)
    return Trial(
        number,
        run,
        values,
        flops_per_token=of.model.flops_per_token(of.data.sequence_length),
        parameters=of.model.num_params(),
        active_parameters=of.model.num_active_params(),
        seed=of.train.seed,
    )


def proposals(config: Config) -> Iterator[Values]:
    """Values of each trial in order, of algorithms that do not learn; equal each time."""
    if config.sweep.auto:
        yield from ladder_values(config)
        return
    yield from (with_configured(config, first) for first in config.sweep.first)
    if config.sweep.algorithm == "grid":
        yield from grid_points(config)
        return
    for number in itertools.count(len(config.sweep.first)):
        yield draw(config, number)


class Search:
    """Proposes `sweep.trials` trials.

    Args:
        past: those of an earlier start of the sweep.
    """

    def __init__(self, config: Config, past: list[Trial]) -> None:
        self._config = config
        self._next = len(past)
        self._optuna = OptunaSearch(config, past) if config.sweep.algorithm == "optuna" else None
        self._proposals = itertools.islice(proposals(config), self._next, config.sweep.trials)

    def propose(self) -> Trial | None:
        """The next trial; None after the last."""
        number = self._next
        values = next(self._proposals, None)
        if values is None:
            return None
        self._next += 1
        if self._optuna is not None:
            is_given = number < len(self._config.sweep.first)
            values = self._optuna.ask(number, values if is_given else None)
        trial = new_trial(self._config, number, values)
        if trial.status == "infeasible":
            self.tell(trial)
        return trial

    def tell(self, trial: Trial) -> None:
        """Learn from a trial that has ended."""
        if self._optuna is not None:
            self._optuna.tell(trial)


class OptunaSearch:
    """Optuna's tree of Parzen estimators over the space; a trial is known to it by its number."""

    def __init__(self, config: Config, past: list[Trial]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._config = config
        # A seed of its own for each start: the same one would propose the same trials again.
        sampler = optuna.samplers.TPESampler(
            seed=config.sweep.seed + len(past), n_startup_trials=max(4, config.sweep.trials // 4)
        )
        self._study = optuna.create_study(sampler=sampler)
        self._asked: dict[int, optuna.Trial] = {}
        for trial in past:
            self.ask(trial.number, dict(trial.values))
            self.tell(trial)

    def ask(self, number: int, given: Values | None = None) -> Values:
        """Values to try, or the given ones."""
        if given is not None:
            if not all(contains(self._config.sweep.space[name], value) for name, value in given.items()):
                return given
            self._study.enqueue_trial(
                {name: _encode(self._config.sweep.space[name], value) for name, value in given.items()}
            )
        asked = self._asked[number] = self._study.ask()
        return walk(self._config, lambda name, dimension: _suggest(asked, name, dimension))

    def tell(self, trial: Trial) -> None:
        """Learn from a trial, unless it has not ended or has values from outside the space."""
        import optuna

        asked, states = self._asked.get(trial.number), optuna.trial.TrialState
        value = _IMPOSSIBLE if trial.status == "infeasible" else score(self._config.sweep, trial.metrics)
        if asked is None or trial.status in ("pending", "running"):
            return
        if trial.status == "failed" or value is None:
            self._study.tell(asked, state=states.FAIL)
        elif trial.status == "stopped":
            asked.report(value, trial.steps)
            self._study.tell(asked, state=states.PRUNED)
        else:
            self._study.tell(asked, value)
        del self._asked[trial.number]


def _encode(dimension: Dimension, value: Any) -> Any:
    """Optuna's choices are text and numbers; ours may be lists, so it gets their places."""
    return value if dimension.values is None else dimension.values.index(value)


def _suggest(trial: "optuna.Trial", name: str, dimension: Dimension) -> Any:
    values = dimension.values
    if values is None:
        assert dimension.bounds is not None, "values or bounds"
        return trial.suggest_float(name, *dimension.bounds, log=dimension.loguniform is not None)
    if dimension.integers is not None:
        return values[trial.suggest_int(name, 0, len(values) - 1)]
    return values[trial.suggest_categorical(name, list(range(len(values))))]
