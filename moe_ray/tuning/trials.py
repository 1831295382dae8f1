"""What is known of the trials of a sweep: `trials.jsonl` in its folder, one object a trial."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moe_ray.errors import DataError
from moe_ray.storage import Storage

TRIALS = "trials.jsonl"
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
        lines = sweep.read(TRIALS).decode().splitlines()
    except FileNotFoundError:
        return []
    try:
        return [_parse(line) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{TRIALS} of {sweep.uri!r} does not hold trials: {error}.",
            "restore it, or set another train.name to start a new sweep.",
        ) from None


def write_trials(sweep: Storage, trials: Iterable[Trial]) -> None:
    """Replace the file, whole or not at all.

    Raises:
        StorageError: it could not be written.
    """
    in_order = sorted(trials, key=lambda trial: trial.number)
    sweep.write(TRIALS, "".join(json.dumps(asdict(trial)) + "\n" for trial in in_order).encode())


def _parse(line: str) -> Trial:
    fields = json.loads(line)
    return Trial(**fields | {"history": tuple((step, value) for step, value in fields["history"])})
