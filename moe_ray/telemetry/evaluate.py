"""Rules evaluated in process, to what Prometheus makes of the same samples."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from moe_ray.telemetry.conditions import Condition, Term
from moe_ray.telemetry.rules import Rule
from moe_ray.telemetry.sample_store import Labels, SampleStore

Vector = dict[Labels, float]
_AGGREGATES = {"sum": math.fsum, "max": max, "min": min, "count": len}


def holds(rule: Rule, store: SampleStore, now: float) -> Vector:
    """The labels for which all conditions of a rule hold now, and the value of the first."""
    first, *others = rule.conditions
    found = _condition(first, store, now)
    for other in others:
        allowed = _condition(other, store, now)
        found = {labels: value for labels, value in found.items() if _only(labels, other.by) in allowed}
    return found


def number(condition: Condition, store: SampleStore, now: float) -> Vector:
    """What a condition compares, of each set of labels that both of its terms have."""
    values = _term(condition.term, condition.by, store, now)
    if condition.over is None:
        return values
    divisors = _term(condition.over, condition.by, store, now)
    return {labels: _divide(value, divisors[labels]) for labels, value in values.items() if labels in divisors}


def _condition(condition: Condition, store: SampleStore, now: float) -> Vector:
    limit, is_above = condition.threshold, condition.compare == ">"
    return {
        labels: value
        for labels, value in number(condition, store, now).items()
        if (value > limit if is_above else value < limit)
    }


def _term(term: Term, by: tuple[str, ...], store: SampleStore, now: float) -> Vector:
    groups: dict[Labels, list[float]] = {}
    for labels, value in _transformed(term, store, now):
        if all(re.fullmatch(pattern, dict(labels).get(label, "")) for label, pattern in term.where):
            groups.setdefault(_only(labels, by), []).append(value)
    return {labels: float(_AGGREGATES[term.aggregate](values)) for labels, values in groups.items()}


def _transformed(term: Term, store: SampleStore, now: float) -> Iterator[tuple[Labels, float]]:
    if term.transform in ("value", "age"):
        for labels, value in store.at(term.metric, now):
            yield labels, now - value if term.transform == "age" else value
        return
    current = dict(store.at(term.metric, now))
    for labels, points in store.window(term.metric, now, term.window):
        values = [value for _, value in points]
        if term.transform == "rise" and labels in current:
            yield labels, current[labels] - min(values)
        elif term.transform == "gone" and labels not in current:
            yield labels, max(values)
        elif term.transform == "increase" and len(points) > 1:
            yield labels, _increase(points, now - term.window, now)


def _increase(points: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Growth of a counter, extrapolated to the borders of the window unless they are far from the samples.

    As `extrapolatedRate` of Prometheus (promql/functions.go).
    """
    (first_time, first), (last_time, last) = points[0], points[-1]
    values = [value for _, value in points]
    resets = math.fsum(before for before, after in pairwise(values) if after < before)
    growth, sampled = last - first + resets, last_time - first_time
    mean_gap = sampled / (len(points) - 1)
    to_begin, to_end = first_time - begin, end - last_time
    if growth > 0 and first >= 0:
        # A counter has not been below zero.
        to_begin = min(to_begin, sampled * first / growth)
    covered = sampled + sum(gap if gap < 1.1 * mean_gap else mean_gap / 2 for gap in (to_begin, to_end))
    return growth * covered / sampled


def _only(labels: Iterable[tuple[str, str]], by: tuple[str, ...]) -> Labels:
    return tuple((name, value) for name, value in labels if name in by and value)


def _divide(value: float, divisor: float) -> float:
    if divisor == 0:
        return math.nan if value == 0 or math.isnan(value) else math.copysign(math.inf, value)
    return value / divisor
