"""A run whose folder is a bucket: trained, killed, resumed, read, evaluated and exported."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import evaluate, export
from moe_ray.checkpoint.catalog import list_steps, read_step
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import Config, build_config
from moe_ray.data.prepare import prepare
from moe_ray.errors import CheckpointError
from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import read_metrics
from tests.s3_server import S3Server
from tests.tiny import copy_corpus, rank_main, run, tiny_settings
from tests.waiting import until
from tests.worlds import kill_world, run_world, start_world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """Jobs set up logging for a process of their own."""
    loggers = [logging.getLogger(), logging.getLogger("moe_ray")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture
def make_config(corpus: Path, s3: S3Server) -> Callable[..., Config]:
    uri = s3.fresh_uri()

    def make(*overrides: str, storage: str | Path = uri) -> Config:
        settings = ["parallel.workers=2", "parallel.ep=2", "checkpoint.keep_last=2", *overrides]
        return build_config(tiny_settings(corpus, storage, "run"), settings)

    return make


def start(config: Config) -> list[Any]:
    return start_world(2, rank_main, config, prepare(config))


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    assert [m["step"] for m in metrics] == list(range(1, 13))
    return [m["loss"] for m in metrics]


def test_a_killed_run_resumes_on_the_undisturbed_curve(
    make_config: Callable[..., Config], tmp_path: Path, cache: Path
) -> None:
    undisturbed = losses(run(make_config(storage=tmp_path)))
    config = make_config()
    storage = open_storage(config.train.run_uri)
    world = start(config)
    try:
        until(lambda: list_steps(storage), seconds=50)
    finally:
        kill_world(world)
    saved = list_steps(storage)[-1]
    assert saved < 12, "the run ended before it could be killed"
    run_world(2, rank_main, config, prepare(config))
    metrics = read_metrics(storage)
    assert losses(metrics) == pytest.approx(undisturbed, rel=1e-6)
    assert {m["resumed_step"] for m in metrics} <= {0, saved}
    assert metrics[-1]["resumed_step"] == saved
    assert list_steps(storage) == [8, 12]
    names = {"attempt", "metrics.jsonl"}
    for step in (8, 12):
        files = ["manifest.json", *(entry.name for entry in read_step(storage, step).files)]
        names |= {f"checkpoints/step-{step:08d}/{name}" for name in files}
    assert set(storage.list()) == names
    # What was copied to this node to be resumed from is not kept.
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_run_in_a_bucket_serves_all_that_read_runs(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, on_disk = make_config(), make_config(storage=tmp_path)
    run_world(2, rank_main, config, prepare(config))
    run(on_disk)
    uri = config.train.run_uri
    expected = load_for_inference(on_disk.train.run_dir)
    for source in (uri, under(uri, "checkpoints/step-00000012")):
        loaded = load_for_inference(source)
        assert (loaded.step, loaded.name, loaded.data_digest) == (12, "run", expected.data_digest)
        for name, tensor in expected.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], tensor), name
    assert load_for_inference(under(uri, "checkpoints/step-00000008")).step == 8
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_for_inference(under(uri, "nothing"))
    evaluate.main(uri, [])
    evaluate.main(str(on_disk.train.run_dir), [])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    from_bucket, from_disk = (json.loads(line) for line in lines)
    assert from_bucket == from_disk
    assert from_bucket["step"] == 12


def test_evaluation_on_other_text_and_export_take_the_address_of_a_bucket(
    make_config: Callable[..., Config], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config("train.steps=4")
    run_world(2, rank_main, config, prepare(config))
    uri = config.train.run_uri
    evaluate.main(uri, [f"data.sources=[{corpus}/c*.txt]", f"data.path={tmp_path}/other"])
    export.main(uri, str(tmp_path / "hf"), [])
    exported, trained = load_for_inference(tmp_path / "hf").model, load_for_inference(uri).model
    for name, tensor in trained.named_parameters():
        assert torch.equal(exported.get_parameter(name), tensor), name
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "hf", "other", ".other.lock"}


def under(uri: str, name: str) -> str:
    base, mark, query = uri.partition("?")
    return f"{base}/{name}{mark}{query}"
