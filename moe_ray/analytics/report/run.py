"""What a report is made of: the files of a run, and what was computed from its checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import yaml

from moe_ray.analytics.analysis import Analysis
from moe_ray.analytics.report.alerts import RaisedAlert, alerts_of
from moe_ray.analytics.report.events import Mark, Restart, marks_of, on_axes, restarts_of
from moe_ray.analytics.report.parts import Sample
from moe_ray.config import Config, build_config
from moe_ray.errors import ConfigError
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.history import History, read_history
from moe_ray.telemetry.run_log import EVENTS, METRICS, RUN_SETTINGS, SWEEP_SETTINGS, read_events


@dataclass(frozen=True)
class Run:
    """A run as the report sees it.

    Attributes:
        settings: `config.yaml` as it stands; empty if it is missing or damaged.
        config: the same, if this version understands it.
        marks: all that happened to its workers.
        alerts: that it raised; those that still fire come first.
        analysis: of its newest checkpoints; None if there is none.
        why_not: why there is no analysis.
        samples: texts of its newest checkpoint.
    """

    name: str
    settings: Mapping[str, Any]
    config: Config | None
    history: History
    marks: Sequence[Mark]
    restarts: Sequence[Restart]
    alerts: Sequence[RaisedAlert] = ()
    analysis: Analysis | None = None
    why_not: str = ""
    samples: Sequence[Sample] = ()

    @property
    def steps(self) -> tuple[int, int] | None:
        """First and last logged step."""
        steps = self.history.column("step")
        return (int(steps[0]), int(steps[-1])) if len(steps) else None

    @property
    def target(self) -> int | None:
        """Steps that the run is to have."""
        return self.config.train.steps if self.config is not None else None

    @property
    def log_every(self) -> int | None:
        """Steps from one logged step to the next, at most."""
        return self.config.train.log_every if self.config is not None else None

    @property
    def axis_marks(self) -> list[Mark]:
        """The events drawn over charts."""
        return on_axes(self.marks)

    @property
    def layers(self) -> Sequence[int]:
        """Numbers of the blocks with experts, in the order of the lists by layer."""
        logged = next((values.shape[1] for values in self.history.by_layer.values()), 0)
        known = self.config.model.moe_layers if self.config and self.config.model.is_known("num_layers") else ()
        return known if len(known) == logged else range(logged)


def read_run(uri: str) -> Run:
    """Read the small files of a run.

    Raises:
        ConfigError: there is no run.
        StorageError: it cannot be read now.
    """
    storage, name = open_run(uri)
    content = storage.read(RUN_SETTINGS) if storage.exists(RUN_SETTINGS) else b""
    settings = _parse(content)
    history = read_history(storage, most_layers=_layer_rows(settings))
    events = read_events(storage)
    marks, restarts = marks_of(events, history), restarts_of(events, history)
    return Run(name, settings, _config(settings), history, marks, restarts, alerts_of(events, history))


def open_run(uri: str) -> tuple[Storage, str]:
    """The storage of a run, and its name.

    Raises:
        ConfigError: there is no run.
        StorageError: it cannot be read now.
    """
    storage = open_storage(uri)
    if not any(storage.exists(name) for name in (RUN_SETTINGS, METRICS, EVENTS)):
        if storage.exists(SWEEP_SETTINGS):
            raise ConfigError(
                f"{uri!r} is a sweep, no run.", "give the folder of one of its trials in it, trial-NNN."
            )
        raise ConfigError(
            f"{uri!r} holds no run: it has neither {RUN_SETTINGS} nor {METRICS}.",
            "give the folder of a run, STORAGE/NAME, or its s3:// or gs:// URI.",
        )
    base = uri.partition("?")[0] if storage.local is None else str(storage.local)
    return storage, base.rstrip("/").rpartition("/")[2]


def distinct_names(runs: Sequence[Run]) -> list[Run]:
    """The runs with names that tell them apart: two folders may be called alike."""
    names = [run.name for run in runs]
    counts = np.unique(names, return_counts=True)
    twice = {name for name, count in zip(*counts, strict=True) if count > 1}
    return [
        replace(run, name=f"{run.name} ({number})") if run.name in twice else run
        for number, run in enumerate(runs, 1)
    ]


def _parse(content: bytes) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(content)
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _config(settings: Mapping[str, Any]) -> Config | None:
    try:
        return build_config(dict(settings)) if settings else None
    except ConfigError:
        return None


def _layer_rows(settings: Mapping[str, Any]) -> int:
    """Columns of heat maps over time: fewer, the more cells each has."""
    model = settings.get("model")
    sizes = [model.get(name) for name in ("num_layers", "num_experts")] if isinstance(model, dict) else []
    largest = max((size for size in sizes if isinstance(size, int)), default=1)
    return int(np.clip(12_000 // max(1, largest), 24, 120))
