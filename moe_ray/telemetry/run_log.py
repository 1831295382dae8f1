"""The logs of a run, one JSON object a line: `metrics.jsonl`, a logged step each, continuous over restarts, and
`events.jsonl`, what happened to its workers.
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

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
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


def read_metrics(run: Path | Storage) -> list[dict[str, Any]]:
    """All whole lines of a run, without those that a crash left unfinished or damaged."""
    return [metrics for metrics in _records(run, METRICS) if isinstance(metrics.get("step"), int)]


def read_events(run: Path | Storage) -> list[dict[str, Any]]:
    """What happened to the workers of a run, oldest first."""
    return [event for event in _records(run, EVENTS) if "event" in event]


def drop_metrics_after(run: Storage, step: int) -> None:
    """Forget the steps that a resumed run will do again, and lines that cannot be read.

    Raises:
        StorageError: they could not be written.
    """
    kept = [metrics for metrics in read_metrics(run) if metrics["step"] <= step]
    run.write(METRICS, "".join(json.dumps(metrics) + "\n" for metrics in kept).encode())


def _records(run: Path | Storage, name: str) -> list[dict[str, Any]]:
    lines = _read(open_storage(run) if isinstance(run, Path) else run, name).decode(errors="replace").split("\n")
    parsed = (_parse(line) for line in lines[:-1])
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


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
