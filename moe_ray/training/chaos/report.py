"""The table of a chaos run and what is wrong with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_ray.config import Config
from moe_ray.training.chaos.schedule import Fault, redone_limit

LOSS_TOLERANCE = 1e-4
_HEADER = ("fault", "at step", "detected [s]", "recovered [s]", "redone", "lost", "note")


@dataclass(frozen=True)
class Row:
    """What came of one fault.

    Attributes:
        step: newest logged step when it struck, or the planned one if it did not.
        detection_seconds: None if nothing noticed it.
        recovery_seconds: None if training did not go on, or the fault did not strike.
        redone: steps that were done again.
        lost: steps up to the next fault whose samples are not those of the undisturbed run.
        note: whom it hit, or why it was not run.
        was_run: whether it struck.
        wrong: what was against the rules, beside the numbers.
    """

    fault: Fault
    step: int
    detection_seconds: float | None = None
    recovery_seconds: float | None = None
    redone: int = 0
    lost: int = 0
    note: str = ""
    was_run: bool = True
    wrong: str = ""


@dataclass(frozen=True)
class LossDifference:
    """Relative differences to the undisturbed run: of the last step, and the largest of all."""

    final: float
    largest: float


def differing_steps(reference: Sequence[Mapping[str, Any]], disturbed: Sequence[Mapping[str, Any]]) -> list[int]:
    """Steps whose samples are not the same, or not proven to be: without a line on one side, or with two."""
    expected, found = ({m["step"]: m["sample_checksum"] for m in metrics} for metrics in (reference, disturbed))
    steps = [m["step"] for m in disturbed]
    twice = {step for step in steps if steps.count(step) > 1} if len(steps) > len(found) else set()
    differing = {step for step in expected.keys() | found if expected.get(step) != found.get(step)}
    return sorted(differing | twice)


def loss_difference(
    reference: Sequence[Mapping[str, Any]], disturbed: Sequence[Mapping[str, Any]]
) -> LossDifference:
    """Over the steps that both have; infinite where only one of them was finite, or if there are none."""
    expected = {m["step"]: m["loss"] for m in reference}
    differences = [_relative(expected[m["step"]], m["loss"]) for m in disturbed if m["step"] in expected]
    return (
        LossDifference(differences[-1], max(differences)) if differences else LossDifference(*[float("inf")] * 2)
    )


def problems(rows: Sequence[Row], num_lost: int, loss: LossDifference, config: Config) -> list[str]:
    """What breaks the promises of training, a sentence each; none: all is well."""
    found = [f"{row.fault} at step {row.step}: {row.wrong}" for row in rows if row.wrong]
    found += [f"{row.fault} at step {row.step} never recovered" for row in rows if _is_stuck(row)]
    for row in rows:
        limit = redone_limit(row.fault, config)
        if row.redone > limit:
            found.append(f"{row.fault} at step {row.step} cost {row.redone} steps, more than {limit}")
    if num_lost:
        found.append(f"{num_lost} steps have other samples than the undisturbed run")
    # Other worlds add in another order, which in bfloat16 shows.
    if config.train.dtype == "float32" and not loss.largest <= LOSS_TOLERANCE:
        found.append(f"the loss differs by up to {loss.largest:.1e}, more than {LOSS_TOLERANCE:.0e}")
    return found


def table(rows: Sequence[Row]) -> str:
    """One line a fault."""
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _is_stuck(row: Row) -> bool:
    return row.was_run and row.recovery_seconds is None


def _cells(row: Row) -> tuple[str, ...]:
    if not row.was_run:
        return (row.fault, str(row.step), "-", "-", "-", "-", f"not run: {row.note}")
    times = ("-" if t is None else f"{t:.1f}" for t in (row.detection_seconds, row.recovery_seconds))
    return (row.fault, str(row.step), *times, str(row.redone), str(row.lost), row.note)


def _relative(expected: float | None, found: float | None) -> float:
    if expected is None or found is None:
        return 0.0 if expected is found else float("inf")
    return abs(found - expected) / max(abs(expected), 1e-12)
