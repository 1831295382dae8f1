"""Runs are followed by the real TensorBoard, MLflow and Weights & Biases, which write to a folder."""

import importlib.util
import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_ray.config import Config, build_config
from moe_ray.errors import ConfigError
from moe_ray.storage import open_storage
from moe_ray.telemetry.trackers import follow
from moe_ray.telemetry.trackers.follow import check_trackers, follow_run
from moe_ray.telemetry.trackers.run import tracked_numbers

for module in ("tensorboardX", "mlflow", "wandb"):
    pytest.importorskip(module)
pytestmark = pytest.mark.filterwarnings("ignore")
# Loss by step.
Curve = list[tuple[int, float]]


def make_config(storage: Path, *overrides: str) -> Config:
    return build_config(
        {"model": {"num_layers": 3, "num_dense_layers": 1}},
        [f"train.storage={storage}", "train.name=wiki", "telemetry.project=mine", *overrides],
    )


def record(step: int, resumed_step: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 5 - step / 10,
        "grad_norm": None,
        "load_cv_by_layer": [0.5, 0.25],
        "load_by_layer": [[0.5, 0.5], [0.25, 0.75]],
        "val_perplexity_by_domain": {"code": 90.0 + step},
        "resumed_step": resumed_step,
    }


def train(config: Config, first: int, last: int) -> None:
    """A start of a run that logs these steps."""
    folder = config.train.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    with follow_run(config, open_storage(folder)) as take:
        for step in range(first, last + 1):
            take(record(step, first - 1))


def read_tensorboard(folder: Path, name: str = "wiki") -> tuple[Curve, str]:
    """As TensorBoard reads it, without what later starts have purged."""
    from tensorboardX.proto.event_pb2 import Event

    losses: Curve = []
    text = ""
    for path in sorted((folder / "tensorboard" / name).iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += size + 16
            if event.WhichOneof("what") == "session_log":
                losses = [point for point in losses if point[0] < event.step]
            for value in event.summary.value:
                if value.tag == "loss":
                    losses.append((event.step, value.simple_value))
                if value.tag.startswith("settings"):
                    text = value.tensor.string_val[0].decode()
    return sorted(losses), text


def read_mlflow(folder: Path) -> tuple[Curve, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mine")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("wiki", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "loss")
    assert {"load_cv_by_layer/1", "load_cv_by_layer/2", "val_perplexity_by_domain/code"} <= run.data.metrics.keys()
    return sorted({metric.step: metric.value for metric in history}.items()), json.dumps(run.data.params)


def read_wandb(folder: Path) -> tuple[Curve, str]:
    from wandb.proto.wandb_internal_pb2 import Record

    losses: dict[int, float] = {}
    ids, settings = set(), ""
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for content in wandb_records(path.read_bytes()):
            found = Record.FromString(content)
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in found.history.item}
            if "loss" in items:
                losses[int(items["step"])] = float(items["loss"])
            if found.run.run_id:
                ids.add((found.run.run_id, found.run.display_name, found.run.project))
                settings = settings or str({item.key: item.value_json for item in found.run.config.update})
    assert len(ids) == 1
    assert [name[1:] for name in ids] == [("wiki", "mine")]
    return sorted(losses.items()), settings


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, after a header of 7 bytes: parts of them in blocks of 32 KB."""
    block, place, parts = 32_768, 7, b""
    while place + 7 <= len(content):
        if block - place % block < 7:
            place += block - place % block
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if kind == 0:
            break
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


READERS: dict[str, Callable[[Path], tuple[Curve, str]]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "wandb": read_wandb,
}


@pytest.mark.parametrize("tracker", READERS)
def test_a_run_is_followed_over_a_restart(tracker: str, tmp_path: Path) -> None:
    config = make_config(tmp_path, f"telemetry.trackers=[{tracker}]")
    train(config, 1, 4)
    # Steps 3 and 4 were not saved, and are done again.
    train(config, 3, 6)
    curve, settings = READERS[tracker](config.train.run_dir / "trackers")
    assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in curve] == pytest.approx([5 - step / 10 for step in range(1, 7)])
    assert "num_dense_layers" in settings


def test_numbers_of_layers_and_domains_have_names() -> None:
    assert tracked_numbers(record(2), make_config(Path("/x"))) == {
        "step": 2,
        "loss": 4.8,
        "load_cv_by_layer/1": 0.5,
        "load_cv_by_layer/2": 0.25,
        "val_perplexity_by_domain/code": 92.0,
        "resumed_step": 0,
    }


def test_a_broken_tracker_warns_once_and_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "moe_ray")
    (tmp_path / "mlflow.db").write_text("no database, whatever its name says")
    config = make_config(
        tmp_path, "telemetry.trackers=[mlflow, tensorboard]", f"telemetry.tracking_folder={tmp_path}"
    )
    train(config, 1, 6)
    assert [r.getMessage().partition(" failed")[0] for r in caplog.records if r.name == follow.__name__] == [
        "mlflow"
    ]
    assert len(read_tensorboard(tmp_path)[0]) == 6


def test_settings_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = make_config(tmp_path, "telemetry.trackers=[wandb]")
    check_trackers(config)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(ConfigError, match=r"'wandb', which is not installed. Fix: pip install 'moe_ray\[wandb\]'"):
        check_trackers(config)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD"):
        make_config(tmp_path, "telemetry.mlflow_uri=https://me:secret@host")
    with pytest.raises(ConfigError, match=r"\['wandb'\] keep files, and 's3://bucket/runs' is no folder"):
        make_config(Path("x"), "telemetry.trackers=[wandb]", "train.storage=s3://bucket/runs")
    make_config(
        Path("x"), "telemetry.trackers=[mlflow]", "train.storage=s3://b/r", "telemetry.mlflow_uri=http://host:5000"
    )


def test_nothing_runs_without_trackers(tmp_path: Path) -> None:
    train(make_config(tmp_path), 1, 2)
    assert "trackers" not in {thread.name for thread in threading.enumerate()}
    assert list((tmp_path / "wiki").iterdir()) == []
