"""What is new in the files of a run that trains, without reading again what is known."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from moe_ray.checkpoint.catalog import list_steps
from moe_ray.storage import Storage
from moe_ray.telemetry.history import parse_metrics
from moe_ray.telemetry.records import is_number
from moe_ray.telemetry.run_log import METRICS, RUN_SETTINGS, read_events


@dataclass(frozen=True)
class Snapshot:
    """A run at a moment.

    Attributes:
        target: steps that it is to have; None if its config.yaml does not say.
        records: of all logged steps, without their loads.
        newest: the last of them, with its loads; None before the first.
        checkpoint: step of the newest complete checkpoint; None without one.
        time: when it was looked at, Unix time.
    """

    name: str
    target: int | None
    records: Sequence[Mapping[str, Any]]
    newest: Mapping[str, Any] | None
    events: Sequence[Mapping[str, Any]]
    checkpoint: int | None
    time: float

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done and saved; what is after it, nobody writes."""
        step = self.newest["step"] if self.newest is not None else 0
        return self.target is not None and step >= self.target and (self.checkpoint or 0) >= self.target


@dataclass
class RunTail:
    """Follows the files of a run."""

    run: Storage
    name: str
    _log: "_LogTail" = field(init=False)

    def __post_init__(self) -> None:
        self._log = _LogTail(self.run)

    def look(self, now: float) -> Snapshot:
        """The run as it is now.

        Raises:
            StorageError: it cannot be read.
        """
        self._log.read()
        steps = list_steps(self.run)
        return Snapshot(
            self.name,
            self._target(),
            tuple(self._log.records),
            self._log.newest,
            read_events(self.run),
            max(steps, default=None),
            now,
        )

    def _target(self) -> int | None:
        try:
            settings = yaml.safe_load(self.run.read(RUN_SETTINGS))
            steps = settings["train"]["steps"]
        except (FileNotFoundError, KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError):
            return None
        return steps if isinstance(steps, int) and is_number(steps) else None


class _LogTail:
    """Whole lines of `metrics.jsonl`; of a file of this machine only those that were appended.

    A resumed run replaces the file by one without the steps that it will do again: all is read anew then.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._file = (0, 0)
        self._offset = 0
        self.records: list[Mapping[str, Any]] = []
        self.newest: Mapping[str, Any] | None = None

    def read(self) -> None:
        """Take in what is new."""
        content = self._whole() if self._run.local is None else self._appended()
        end = content.rfind(b"\n") + 1
        self._offset += end
        last = None
        for line in content[:end].splitlines(keepends=True):
            record = parse_metrics(line, loads=False)
            if record is not None:
                self.records.append(record)
                last = line
        if last is not None:
            self.newest = parse_metrics(last, loads=True)

    def _whole(self) -> bytes:
        try:
            content = self._run.read(METRICS)
        except FileNotFoundError:
            content = b""
        self._forget()
        return content

    def _appended(self) -> bytes:
        assert self._run.local is not None
        try:
            file = (self._run.local / METRICS).open("rb")
        except FileNotFoundError:
            self._forget()
            return b""
        with file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._file or status.st_size < self._offset:
                self._forget()
            self._file = identity
            file.seek(self._offset)
            return file.read()

    def _forget(self) -> None:
        self._offset = 0
        self.records = []
        self.newest = None
