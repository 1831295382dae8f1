"""What is known of the trials of a sweep: `trials.jsonl` in its folder, one object a trial."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from moe_ray.errors import DataError
from moe_ray.storage import Storage

TRIALS = "trials.jsonl"
T = TypeVar("T")
Status = Literal["pending", "running", "finished", "stopped", "failed", "infeasible"]


@dataclass(frozen=True)
class Trial:
    """One configuration of a sweep and what has become of it.

    Attributes:
        number: its place in the sweep, from 0.
        run: name of its run folder in the sweep's folder.
        values: its settings by `section.field`.
        status: `stopped` was ended early by the scheduler, `failed` gave up after its retries, `infeasible` are
            values that exclude each other.
        reason: of a failure, infeasibility or stop.
        steps: optimizer steps done.
        metrics: the newest value of every number that its run reported.
        history: step and objective of each evaluation.
        flops_per_token: of training, forward and backward.
        parameters: of the model, all.
        active_parameters: those that a token meets.
        seconds: spent on it, over all attempts.
        attempts: how often it was started.
        seed: of initialisation and data order.
    """

    number: int
    run: str
    values: Mapping[str, Any]
    status: Status = "pending"
    reason: str | None = None
    steps: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    history: tuple[tuple[int, float], ...] = ()
    flops_per_token: float | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    seconds: float = 0.0
    attempts: int = 0
    seed: int = 0


def read_trials(sweep: Storage) -> list[Trial]:
    """Trials by number; none if the sweep has not begun.

    Raises:
        DataError: the file holds something else.
    """
    try:
        lines = sweep.read(TRIALS).splitlines()
    except FileNotFoundError:
        return []
    trials = parse_lines(sweep, TRIALS, Trial, lines)
    if len({trial.number for trial in trials}) < len(trials):
        raise damaged(sweep, TRIALS, "a number occurs twice")
    return trials


def write_trials(sweep: Storage, trials: Iterable[Trial]) -> None:
    """Replace the file, whole or not at all.

    Raises:
        StorageError: it could not be written.
    """
    in_order = sorted(trials, key=lambda trial: trial.number)
    sweep.write(TRIALS, "".join(json.dumps(asdict(trial)) + "\n" for trial in in_order).encode())


def parse_lines(sweep: Storage, name: str, kind: type[T], lines: Iterable[bytes]) -> list[T]:
    """Read JSON objects of a sweep's file as objects of a dataclass.

    Raises:
        DataError: one is something else.
    """
    parse = TypeAdapter(kind).validate_json
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(parse(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise damaged(sweep, name, f"line {number}: {where}{': ' if where else ''}{first['msg']}") from None
    return found


def damaged(sweep: Storage, name: str, why: str) -> DataError:
    """What is raised where a file of a sweep holds something else."""
    return DataError(
        f"{name} of {sweep.uri!r} cannot be used: {why}.",
        "restore it, or set another train.name to start a new sweep.",
    )
