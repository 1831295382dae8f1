"""`metrics.jsonl`: one JSON object a logged step, continuous over restarts."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_ray.errors import StorageError

METRICS = "metrics.jsonl"


def append_metrics(run_dir: Path, metrics: Mapping[str, Any]) -> None:
    """Append one line, written whole.

    Raises:
        StorageError: it could not be written.
    """
    try:
        with (run_dir / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
    except OSError as error:
        raise StorageError(
            f"{str(run_dir / METRICS)!r} could not be written: {error.strerror}.",
            "free space or mend the storage and run the same command again.",
        ) from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of a run, without those that a crash left unfinished or damaged."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    parsed = (_parse(line) for line in lines[:-1])
    return [metrics for metrics in parsed if metrics is not None]


def drop_metrics_after(run_dir: Path, step: int) -> None:
    """Forget the steps that a resumed run will do again, and lines that cannot be read."""
    kept = [metrics for metrics in read_metrics(run_dir) if metrics["step"] <= step]
    path = run_dir / METRICS
    staged = path.with_suffix(".tmp")
    staged.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept), encoding="utf-8")
    os.replace(staged, path)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        metrics = json.loads(line)
    except ValueError:
        return None
    return metrics if isinstance(metrics, dict) and isinstance(metrics.get("step"), int) else None
