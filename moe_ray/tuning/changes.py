"""What a population does in mid-run: `changes.jsonl` in the sweep's folder, one object a change."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from moe_ray.storage import Storage
from moe_ray.tuning.space import Values
from moe_ray.tuning.trials import TRIALS, damaged, parse_lines

CHANGES = "changes.jsonl"


@dataclass(frozen=True)
class Change:
    """A trial goes on from another's checkpoint.

    Attributes:
        step: of the checkpoint.
        number: of the trial.
        source: number of the trial whose checkpoint it is.
        run: the new run folder of the trial.
        before: values of the trial until then.
        values: those from then on.
    """

    step: int
    number: int
    source: int
    run: str
    before: Values
    values: Values


def read_changes(sweep: Storage, trials: Iterable[int]) -> list[Change]:
    """Those that were decided, in order; none before the first.

    Args:
        trials: numbers of those that there are.

    Raises:
        DataError: the file holds something else.
    """
    try:
        lines = sweep.read(CHANGES).splitlines()
    except FileNotFoundError:
        return []
    changes = parse_lines(sweep, CHANGES, Change, lines)
    unknown = {number for change in changes for number in (change.number, change.source)} - set(trials)
    if unknown:
        raise damaged(sweep, CHANGES, f"it names trial {min(unknown)}, of which {TRIALS} knows nothing")
    return changes


def write_changes(sweep: Storage, changes: Iterable[Change]) -> None:
    """Replace the file, whole or not at all.

    Raises:
        StorageError: it could not be written.
    """
    sweep.write(CHANGES, "".join(json.dumps(asdict(change)) + "\n" for change in changes).encode())
