"""The logs of a run, one JSON object a line.

`metrics.jsonl` has the logged steps, continuous over restarts, `events.jsonl` what happened to the workers, and
`alerts.jsonl` which alerts the run raised. Each has one process that writes it: an object store knows no appending
by two.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_ray.errors import StorageError
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.records import is_step, parse_record, time_of

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
ALERTS = "alerts.jsonl"
# By which the folder of a run is known, and that of a sweep.
RUN_SETTINGS = "config.yaml"
SWEEP_SETTINGS = "sweep.yaml"
_UPLOAD_SECONDS = 5.0
_logger = logging.getLogger(__name__)


class RunLog:
    """Appends to a log of the run from one process; training does not wait for it, nor end with its failure.

    Lines that cannot be written now are written with a later one. An object store knows no appending: there the
    whole file is written anew by a thread, every few seconds at most.
    """

    def __init__(self, run: Storage, name: str = METRICS) -> None:
        self._run = run
        self._name = name
        self._pending = b""
        self._whole = b"" if run.local is not None else _read(run, name)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="run-log")
        self._upload: Future[None] | None = None
        self._uploaded_at = -_UPLOAD_SECONDS
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one line."""
        self._pending += json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        try:
            self._write(wait=False)
        except (OSError, StorageError) as error:
            if not self._warned:
                _logger.warning("%s cannot be written now: %s", self._name, error)
            self._warned = True

    def flush(self) -> Future[None] | None:
        """Start to upload what an object store does not have yet; returns the upload."""
        if self._run.local is not None:
            return None
        return self._begin_upload()

    def close(self) -> None:
        """Write what is left.

        Raises:
            StorageError: it could not be written.
        """
        if not self._pending and not self._whole:
            return
        try:
            self._write(wait=True)
        except OSError as error:
            raise StorageError(
                f"{self._name} of {self._run.uri!r} could not be written: {error.strerror}.",
                "free space or mend the storage and run the same command again.",
            ) from None

    def _write(self, wait: bool) -> None:
        if self._run.local is not None:
            _append(self._run.local / self._name, self._pending)
            self._pending = b""
            return
        self._whole, self._pending = self._whole + self._pending, b""
        if not wait and (self._is_uploading() or time.monotonic() - self._uploaded_at < _UPLOAD_SECONDS):
            return
        finished = self._upload
        begun = self._begin_upload()
        if wait:
            begun.result()
        elif finished is not None:
            finished.result()

    def _begin_upload(self) -> Future[None]:
        self._upload = self._thread.submit(self._run.write, self._name, self._whole)
        self._uploaded_at = time.monotonic()
        return self._upload

    def _is_uploading(self) -> bool:
        return self._upload is not None and not self._upload.done()


class LogTail:
    """Reads what was added to a log of a run since the last time.

    What a resumed run drops and writes anew, the file being another one then, is told again.
    """

    def __init__(self, run: Storage, name: str) -> None:
        self._run = run
        self._name = name
        self._file = (0, 0)
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """Whole records since the last call.

        Raises:
            StorageError: the storage cannot be read now.
        """
        content = self._read()
        end = content.rfind(b"\n") + 1
        self._offset += end
        parsed = map(parse_record, content[:end].decode(errors="replace").split("\n"))
        return [record for record in parsed if record is not None]

    def _read(self) -> bytes:
        if self._run.local is None:
            content = _read(self._run, self._name)
            if len(content) < self._offset:
                self._offset = 0
            return content[self._offset :]
        try:
            with (self._run.local / self._name).open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
                    self._file, self._offset = (status.st_dev, status.st_ino), 0
                file.seek(self._offset)
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise StorageError(
                f"{self._name} of {self._run.uri!r} cannot be read: {error.strerror}.", "mend the storage."
            ) from None


def read_metrics(run: Path | Storage) -> list[dict[str, Any]]:
    """All whole lines of a run, without those that a crash left unfinished or damaged."""
    return [metrics for metrics in _records(run, METRICS) if is_step(metrics)]


def read_events(run: Path | Storage) -> list[dict[str, Any]]:
    """What happened to the workers of a run, and its alerts, oldest first."""
    events = [event for name in (EVENTS, ALERTS) for event in _records(run, name) if "event" in event]
    return sorted(events, key=lambda event: time_of(event) or 0.0)


def drop_metrics_after(run: Storage, step: int) -> None:
    """Forget the steps that a resumed run will do again, and lines that cannot be read.

    Raises:
        StorageError: they could not be written.
    """
    kept = [metrics for metrics in read_metrics(run) if metrics["step"] <= step]
    run.write(METRICS, "".join(json.dumps(metrics) + "\n" for metrics in kept).encode())


def _records(run: Path | Storage, name: str) -> list[dict[str, Any]]:
    lines = _read(open_storage(run) if isinstance(run, Path) else run, name).decode(errors="replace").split("\n")
    parsed = map(parse_record, lines[:-1])
    return [record for record in parsed if record is not None]


def _read(run: Storage, name: str) -> bytes:
    try:
        return run.read(name)
    except FileNotFoundError:
        return b""


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _append(path: Path, content: bytes) -> None:
    """Append all or nothing, so that a full disk leaves no half line for the next one to be glued to."""
    with path.open("ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            written = file.write(content)
            if written != len(content):
                file.write(content[written:])
        except OSError:
            file.truncate(size)
            raise
