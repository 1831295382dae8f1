"""`metrics.jsonl`: one JSON object a logged step, continuous over restarts."""

import json
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_ray.errors import StorageError
from moe_ray.storage import Storage, open_storage

METRICS = "metrics.jsonl"
_UPLOAD_SECONDS = 5.0
_logger = logging.getLogger(__name__)


class RunLog:
    """Appends to the run's metrics from one process; training does not wait for it, nor end with its failure.

    Lines that cannot be written now are written with a later one. An object store knows no appending: there the
    whole file is written anew by a thread, every few seconds at most.
    """

    def __init__(self, run: Storage) -> None:
        self._run = run
        self._pending = b""
        self._whole = b"" if run.local is not None else _read(run)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="run-log")
        self._upload: Future[None] | None = None
        self._uploaded_at = -_UPLOAD_SECONDS
        self._warned = False

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Add one line."""
        self._pending += json.dumps(metrics, allow_nan=False).encode() + b"\n"
        try:
            self._write(wait=False)
        except (OSError, StorageError) as error:
            if not self._warned:
                _logger.warning("%s cannot be written now: %s", METRICS, error)
            self._warned = True

    def close(self) -> None:
        """Write what is left.

        Raises:
            StorageError: it could not be written.
        """
        try:
            self._write(wait=True)
        except OSError as error:
            raise StorageError(
                f"{METRICS} of {self._run.uri!r} could not be written: {error.strerror}.",
                "free space or mend the storage and run the same command again.",
            ) from None

    def _write(self, wait: bool) -> None:
        if self._run.local is not None:
            _append(self._run.local / METRICS, self._pending)
            self._pending = b""
            return
        self._whole, self._pending = self._whole + self._pending, b""
        if not wait and (self._is_uploading() or time.monotonic() - self._uploaded_at < _UPLOAD_SECONDS):
            return
        finished, self._upload = self._upload, self._thread.submit(self._run.write, METRICS, self._whole)
        self._uploaded_at = time.monotonic()
        if wait:
            self._upload.result()
        elif finished is not None:
            finished.result()

    def _is_uploading(self) -> bool:
        return self._upload is not None and not self._upload.done()


def read_metrics(run: Path | Storage) -> list[dict[str, Any]]:
    """All whole lines of a run, without those that a crash left unfinished or damaged."""
    lines = _read(open_storage(run) if isinstance(run, Path) else run).decode(errors="replace").split("\n")
    parsed = (_parse(line) for line in lines[:-1])
    return [metrics for metrics in parsed if metrics is not None]


def drop_metrics_after(run: Storage, step: int) -> None:
    """Forget the steps that a resumed run will do again, and lines that cannot be read.

    Raises:
        StorageError: they could not be written.
    """
    kept = [metrics for metrics in read_metrics(run) if metrics["step"] <= step]
    run.write(METRICS, "".join(json.dumps(metrics) + "\n" for metrics in kept).encode())


def _read(run: Storage) -> bytes:
    try:
        return run.read(METRICS)
    except FileNotFoundError:
        return b""


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
        metrics = json.loads(line)
    except ValueError:
        return None
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get("step"), int) else None
