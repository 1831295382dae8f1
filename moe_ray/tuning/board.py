"""The trials of a sweep as they are now, in memory and in the sweep's folder."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from moe_ray.config import Config
from moe_ray.storage import Storage
from moe_ray.telemetry.records import is_number
from moe_ray.tuning.objective import score
from moe_ray.tuning.trials import Trial, read_trials, write_trials

_WRITE_SECONDS = 1.0


class Board:
    """All trials that have been proposed.

    Attributes:
        config: the settings of the sweep.
        storage: its folder.
        trials: by number.
    """

    def __init__(self, config: Config, storage: Storage) -> None:
        self.config = config
        self.storage = storage
        self.trials = {trial.number: trial for trial in read_trials(storage)}
        self._written_at = float("-inf")

    def put(self, *trials: Trial) -> None:
        """Add or replace trials, and write all of them down."""
        self.trials |= {trial.number: trial for trial in trials}
        self.write()

    def change(self, number: int, **fields: Any) -> None:
        """Replace some fields of a trial, and write all trials down."""
        self.put(replace(self.trials[number], **fields))

    def log(self, number: int, records: Iterable[Mapping[str, Any]], seconds: float) -> None:
        """Add what the run of a trial has logged, which may be steps that it has done again.

        Args:
            seconds: spent since the last call.
        """
        trial = self.trials[number]
        steps, metrics, history = trial.steps, dict(trial.metrics), dict(trial.history)
        for record in records:
            steps = record["step"]
            metrics |= {name: value for name, value in record.items() if is_number(value)}
            if score(self.config.sweep, record) is not None:
                history[steps] = record[self.config.sweep.metric]
        pairs = tuple(sorted((step, value) for step, value in history.items() if step <= steps))
        self.trials[number] = replace(
            trial, steps=steps, metrics=metrics, history=pairs, seconds=trial.seconds + seconds
        )
        if time.monotonic() - self._written_at > _WRITE_SECONDS:
            self.write()

    def last_step(self, trial: Trial) -> int:
        """Of a trial that is not stopped: AutoML gives each of its own another number."""
        return trial.values.get("train.steps", self.config.train.steps)

    def with_status(self, *statuses: str) -> list[Trial]:
        """Trials of these statuses, by number."""
        return [trial for _, trial in sorted(self.trials.items()) if trial.status in statuses]

    def write(self) -> None:
        """Write all trials down."""
        write_trials(self.storage, self.trials.values())
        self._written_at = time.monotonic()
