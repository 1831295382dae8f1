"""Lines of a run's logs as records, told from those that a crash, a disk or a hand has damaged."""

import json
import sys
from collections.abc import Mapping
from typing import Any

_LOADS = "load_by_layer"
BY_LAYER = "_by_layer"
BY_DOMAIN = "val_perplexity_by_domain"
_MOST_STEPS = 1 << 53
_LATEST = 1e11


def parse_record(line: str | bytes) -> dict[str, Any] | None:
    """The object of a line; None if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def is_number(value: object) -> bool:
    """Whether a value is a finite number of at most a float's range; JSON knows longer ones."""
    is_numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return is_numeric and abs(value) <= sys.float_info.max


def time_of(record: Mapping[str, Any]) -> float | None:
    """When a record was written, in Unix seconds; None if it does not say, or no such time can be shown."""
    time = record.get("time")
    return float(time) if is_number(time) and 0 <= time < _LATEST else None  # ty: ignore


def is_step(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a logged step: it has one, and what it lists by layer and domain has its shape."""
    step, loads, domains = record.get("step"), record.get(_LOADS), record.get(BY_DOMAIN)
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < _MOST_STEPS:
        return False
    if "time" in record and time_of(record) is None:
        return False
    if not (domains is None or (isinstance(domains, dict) and all(map(_is_known, domains.values())))):
        return False
    lists = [value for name, value in record.items() if name.endswith(BY_LAYER) and name != _LOADS]
    if not all(isinstance(values, list) and all(map(_is_known, values)) for values in lists):
        return False
    if loads is not None and not _is_rectangle(loads):
        return False
    return len({len(values) for values in (*lists, *([] if loads is None else [loads]))}) <= 1


def one_line(text: object) -> str:
    """What others wrote, so that it neither moves a terminal's cursor nor breaks a line."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def _is_known(value: object) -> bool:
    return value is None or is_number(value)


def _is_rectangle(rows: object) -> bool:
    if not isinstance(rows, list) or not all(isinstance(row, list) and all(map(is_number, row)) for row in rows):
        return False
    return len(set(map(len, rows))) <= 1 and all(rows)
