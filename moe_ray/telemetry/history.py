"""A run's `metrics.jsonl` as columns, in memory that does not grow with the number of experts.

Shapes: N logged steps, M of them whose layers are kept, L MoE layers, E experts.
"""

import math
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moe_ray.storage import Storage
from moe_ray.telemetry.records import BY_DOMAIN, is_number, is_step, parse_record
from moe_ray.telemetry.run_log import METRICS

_LOADS = b'"load_by_layer": [['
_BY_LAYER = "_by_layer"


@dataclass(frozen=True)
class History:
    """What a run logged, without lines that a crash left unfinished or damaged.

    Attributes:
        columns: float64 [N] for each number that was logged, `step` and `time` among them; NaN where it was not.
        by_layer: float64 [M, L] for each list that was logged by layer, without its `_by_layer`.
        load_MLE: share of the routed tokens of each expert, float32; None without experts.
        layers_M: rows of `columns` that `by_layer` and `load_MLE` are of, evenly spread, the last one among them.
        domains: held-out perplexity of each domain, float64 [N]; NaN where it was not measured.
        damaged: lines that could not be read.
    """

    columns: dict[str, np.ndarray]
    by_layer: dict[str, np.ndarray]
    load_MLE: np.ndarray | None
    layers_M: np.ndarray
    domains: dict[str, np.ndarray]
    damaged: int

    def __len__(self) -> int:
        return len(self.columns["step"])

    def column(self, name: str) -> np.ndarray:
        """A column, of NaN where the run never logged it."""
        return self.columns.get(name, np.full(len(self), math.nan))

    def last(self, name: str) -> float | None:
        """The newest finite value of a column."""
        values = self.column(name)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else None


def read_history(run: Storage, most_layers: int = 120) -> History:
    """Read a run in one pass that parses, after one that counts.

    Args:
        run: its storage.
        most_layers: logged steps whose lists by layer are kept.

    Raises:
        StorageError: it cannot be read now.
    """
    with _open_log(run) as file:
        count = sum(line.endswith(b"\n") for line in file)
        file.seek(0)
        kept = set(np.linspace(0, max(0, count - 1), min(count, most_layers)).round().astype(int).tolist())
        lines = (parse_metrics(line, loads=number in kept) for number, line in enumerate(file))
        records = ((number in kept, record) for number, record in enumerate(lines))
        return _to_history(records)


def parse_metrics(line: bytes, loads: bool) -> dict[str, Any] | None:
    """One line of `metrics.jsonl`; None if it is unfinished or damaged.

    Args:
        line: with its end.
        loads: whether `load_by_layer` is wanted, which is nearly all of a line where there are many experts.
    """
    if not line.endswith(b"\n"):
        return None
    start = -1 if loads else line.find(_LOADS)
    end = line.find(b"]]", start)
    if start >= 0 and end >= 0:
        line = line[:start] + b'"load_by_layer": null' + line[end + 2 :]
    record = parse_record(line)
    return record if record is not None and is_step(record) else None


@contextmanager
def _open_log(run: Storage) -> Generator[BinaryIO]:
    """The file, copied to a disk if it is in an object store: it may be larger than memory."""
    with tempfile.TemporaryDirectory(prefix="moe-log-") as folder:
        path = Path(folder) / METRICS
        try:
            if run.local is None:
                run.fetch(METRICS, path)
            file = (path if run.local is None else run.local / METRICS).open("rb")
        except FileNotFoundError:
            file = BytesIO()
        with file:
            yield file


def _to_history(records: Iterable[tuple[bool, dict[str, Any] | None]]) -> History:
    columns: dict[str, list[float]] = {"step": [], "time": []}
    domains: dict[str, list[float]] = {}
    layers: list[dict[str, Any]] = []
    layers_M, damaged, size = [], 0, 0
    for is_kept, record in records:
        if record is None:
            damaged += 1
            continue
        _append(columns, {name: value for name, value in record.items() if is_number(value)}, size)
        _append(domains, record.get(BY_DOMAIN) or {}, size)
        if is_kept and record.get("load_cv_by_layer"):
            layers.append({name: value for name, value in record.items() if name.endswith(_BY_LAYER)})
            layers_M.append(size)
        size += 1
    whole = [row for row in layers if _shape(row) == _shape(layers[-1])]
    rows = [number for number, row in zip(layers_M, layers, strict=True) if _shape(row) == _shape(layers[-1])]
    names = [name for name in (whole[-1] if whole else {}) if name != "load_by_layer"]
    loads = [row.get("load_by_layer") for row in whole]
    return History(
        columns={name: np.array(values) for name, values in columns.items()},
        by_layer={
            name.removesuffix(_BY_LAYER): np.array([row[name] for row in whole], np.float64) for name in names
        },
        load_MLE=np.array(loads, np.float32) if loads and all(loads) else None,
        layers_M=np.array(rows, int),
        domains={name: np.array(values) for name, values in domains.items()},
        damaged=damaged,
    )


def _append(columns: dict[str, list[float]], row: dict[str, Any], size: int) -> None:
    """Add a row to columns that have `size` rows; all have one more then."""
    for name in [name for name in row if name not in columns]:
        columns[name] = [math.nan] * size
    for name, values in columns.items():
        values.append(float(row[name]) if is_number(row.get(name)) else math.nan)


def _shape(row: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    return sorted((name, np.shape(value or ())) for name, value in row.items())
