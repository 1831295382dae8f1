"""`metrics.jsonl`: one JSON object a logged step, continuous over restarts."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def append_metrics(run_dir: Path, metrics: Mapping[str, Any]) -> None:
    """Append one line, written whole."""
    with (run_dir / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole lines of a run; a line that a killed writer left unfinished is not one."""
    path = run_dir / METRICS
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def drop_metrics_after(run_dir: Path, step: int) -> None:
    """Forget the steps that a resumed run will do again, and any unfinished last line."""
    kept = [metrics for metrics in read_metrics(run_dir) if metrics["step"] <= step]
    path = run_dir / METRICS
    staged = path.with_suffix(".tmp")
    staged.write_text("".join(json.dumps(metrics) + "\n" for metrics in kept), encoding="utf-8")
    os.replace(staged, path)
