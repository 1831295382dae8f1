"""What experiment trackers are told of a run."""

import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_ray.config import Config
from moe_ray.storage import Storage

_ID = "tracking-id"


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    Attributes:
        id: equal after a restart; a run that is begun anew under the same name has another one.
        folder: where a tracker keeps what it keeps on a disk.
        resumed_step: what was logged of later steps is done again.
    """

    config: Config
    id: str
    folder: Path
    resumed_step: int

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by `section.field`."""
        sections = self.config.model_dump(mode="json")
        return {f"{name}.{field}": value for name, fields in sections.items() for field, value in fields.items()}


Log = Callable[[int, Mapping[str, float]], None]
"""Takes a step and its numbers."""
Tracker = Callable[[TrackedRun], AbstractContextManager[Log]]


def tracking_id(run: Storage) -> str:
    """The identity of a run, drawn when it is first asked for.

    Raises:
        StorageError: it could not be kept.
    """
    try:
        return run.read(_ID).decode()
    except FileNotFoundError:
        drawn = secrets.token_hex(8)
        run.write(_ID, drawn.encode())
        return drawn


def tracked_numbers(record: Mapping[str, Any], config: Config) -> dict[str, float]:
    """The finite numbers of a record of metrics.jsonl, those of domains and layers as `field/which`."""
    return {
        name: value
        for name, value in _flat(record, config)
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _flat(record: Mapping[str, Any], config: Config) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{key}", inner) for key, inner in value.items())
        elif isinstance(value, list):
            layers = zip(config.model.moe_layers, value, strict=False)
            yield from ((f"{name}/{layer}", inner) for layer, inner in layers)
        else:
            yield name, value
