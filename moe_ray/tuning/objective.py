"""Which trial is better: one number of what runs log, and bounds on others."""

from collections.abc import Iterable, Mapping

from moe_ray.sweep_config import Constraint, SweepConfig
from moe_ray.tuning.trials import Trial

# Above all objectives: a trial out of bounds is worse than any within (Deb 2000), and less so the nearer it is.
_OUT_OF_BOUNDS = 1e9


def score(sweep: SweepConfig, metrics: Mapping[str, float]) -> float | None:
    """The objective as a number of which less is better, out of bounds above all others; None: not reported."""
    value = metrics.get(sweep.metric)
    if value is None:
        return None
    excess = violation(sweep.bounds, metrics)
    return (value if sweep.mode == "min" else -value) + (
        _OUT_OF_BOUNDS * (1 + excess) if excess is not None else 0
    )


def violation(bounds: Iterable[Constraint], metrics: Mapping[str, float]) -> float | None:
    """By how much the metrics miss their bounds, in all; None: not at all. One not reported misses by 1."""
    missed = [bound for bound in bounds if not _holds(bound, metrics.get(bound.metric))]
    if not missed:
        return None
    return sum(abs(metrics.get(bound.metric, bound.bound + 1) - bound.bound) for bound in missed)


def ranked(sweep: SweepConfig, trials: Iterable[Trial]) -> list[Trial]:
    """Trials that have an objective and can be used, the best first."""
    usable = [trial for trial in trials if trial.status not in ("failed", "infeasible")]
    scored = [
        (found, trial.number, trial) for trial in usable if (found := score(sweep, trial.metrics)) is not None
    ]
    return [trial for _, _, trial in sorted(scored, key=lambda item: item[:2])]


def _holds(bound: Constraint, value: float | None) -> bool:
    if value is None:
        return False
    return {
        "<=": value <= bound.bound,
        ">=": value >= bound.bound,
        "<": value < bound.bound,
        ">": value > bound.bound,
    }[bound.relation]
