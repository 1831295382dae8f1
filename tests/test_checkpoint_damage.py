"""No damage to a checkpoint goes unnoticed, and none costs more than the steps since the last good one."""

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs import export
from moe_ray.checkpoint.catalog import DAMAGED, list_checkpoints, list_steps, read_manifest, resolve_checkpoint
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.checkpoint.manifest import MANIFEST
from moe_ray.config import Config, build_config
from moe_ray.data.prepare import prepare
from moe_ray.errors import CheckpointError
from moe_ray.parallel.mesh import build_mesh
from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import read_metrics
from moe_ray.training.loop import train
from tests.s3_server import S3Server
from tests.tiny import copy_corpus, run, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")

ALL_KINDS = frozenset({"model", "optimizer", "tokenizer", "sidecar"})
GOOD, NEWEST = 4, 8
LAYOUTS = {
    "ep": ["parallel.ep=2"],
    "fsdp": ["parallel.shard_dense=true", "parallel.shard_experts=true"],
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def hf_folder(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs start from, so that their checkpoints hold files that describe a tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    config = build_config(tiny_settings(corpus, folder, "run"), ["train.steps=3"])
    run(config)
    export.main(str(config.train.run_dir), str(folder / "hf"), [])
    return folder / "hf"


@pytest.fixture(scope="module", params=LAYOUTS)
def config(
    request: pytest.FixtureRequest, corpus: Path, hf_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """Of a run of two ranks that has two checkpoints; who changes them puts them right."""
    settings = [*LAYOUTS[request.param], "parallel.workers=2", f"model.init_from={hf_folder}"]
    settings += [f"train.steps={NEWEST}", f"checkpoint.every={GOOD}"]
    config = build_config(tiny_settings(corpus, tmp_path_factory.mktemp("runs"), "run"), settings)
    run(config)
    assert list_steps(open_storage(config.train.run_dir)) == [GOOD, NEWEST]
    return config


@pytest.fixture
def copied(config: Config, tmp_path: Path) -> Config:
    """A copy of the run for one process that trains it on with two steps fewer."""
    shutil.copytree(config.train.run_dir, tmp_path / "run")
    tree = config.model_dump(mode="json")
    tree["parallel"] = {}
    return build_config(tree, [f"train.storage={tmp_path}", f"train.steps={NEWEST - 2}", "checkpoint.keep_last=2"])


def newest(config: Config) -> Path:
    return list_checkpoints(config.train.run_dir)[-1]


def all_files(checkpoint: Path) -> list[Path]:
    """Those of a manifest and the manifest itself: nothing else is there."""
    names = {MANIFEST, *(entry.name for entry in read_manifest(checkpoint).files)}
    assert names == {path.name for path in checkpoint.iterdir()}
    return sorted(checkpoint / name for name in names)


@contextmanager
def content(path: Path, changed: bytes | None) -> Iterator[None]:
    """The file with other content, or gone."""
    before = path.read_bytes()
    assert before != changed
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(path: Path, position: int, bit: int) -> bytes:
    damaged = bytearray(path.read_bytes())
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def flip_somewhere(path: Path, seed: int = 0) -> None:
    drawn = random.Random(seed)
    path.write_bytes(flipped(path, drawn.randrange(path.stat().st_size), drawn.randrange(8)))


def assert_passed_over(config: Config, damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    folder, manifest = resolve_checkpoint(config.train.run_dir, ALL_KINDS)
    assert manifest.step == GOOD
    assert folder.name == f"step-{GOOD:08d}"
    assert f"{damaged.parent.name}/{damaged.name}" in caplog.text
    if damaged.name != MANIFEST:
        with pytest.raises(CheckpointError, match=damaged.name):
            resolve_checkpoint(damaged.parent, ALL_KINDS)


def test_a_flipped_bit_in_any_file_is_found(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    drawn, flips = random.Random(1), 0
    files = all_files(newest(config))
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert len(files) >= 8
    for path in files:
        size = path.stat().st_size
        for position in {0, size - 1, *(drawn.randrange(size) for _ in range(26))}:
            with content(path, flipped(path, position, drawn.randrange(8))):
                assert_passed_over(config, path, caplog)
            flips += 1
    assert flips >= 200
    assert resolve_checkpoint(config.train.run_dir, ALL_KINDS)[1].step == NEWEST


def cut(path: Path) -> bytes:
    return path.read_bytes()[:-1]


def emptied(path: Path) -> bytes:
    return b""


def grown(path: Path) -> bytes:
    return path.read_bytes() + b"\0"


def gone(path: Path) -> None:
    return None


def of_another_step(path: Path) -> bytes:
    return (path.parent.parent / f"step-{GOOD:08d}" / path.name).read_bytes()


@pytest.mark.parametrize("change", [cut, emptied, grown, gone, of_another_step])
def test_a_file_that_is_not_its_own_is_found(
    config: Config, caplog: pytest.LogCaptureFixture, change: Callable[[Path], bytes | None]
) -> None:
    for path in all_files(newest(config)):
        if change is of_another_step and of_another_step(path) == path.read_bytes():
            continue
        with content(path, change(path)):
            if (change, path.name) == (gone, MANIFEST):
                # Without a manifest it is no checkpoint that could be damaged.
                assert list_steps(open_storage(config.train.run_dir)) == [GOOD]
                continue
            assert_passed_over(config, path, caplog)


def test_swapped_files_are_found(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    first, second = sorted(newest(config).glob("model-*"))
    one, other = first.read_bytes(), second.read_bytes()
    with content(first, other), content(second, one):
        assert_passed_over(config, first, caplog)


def test_a_file_too_many_harms_nothing(copied: Config, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = list_checkpoints(copied.train.run_dir)[-1]
    (checkpoint / "model-00009-abc.safetensors").write_bytes(b"no tensors")
    assert resolve_checkpoint(copied.train.run_dir, ALL_KINDS)[1].step == NEWEST
    train_on(copied, caplog)
    assert all_files(checkpoint)


def test_inference_passes_over_what_it_would_read(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    for path in all_files(newest(config)):
        with content(path, flipped(path, path.stat().st_size // 2, 0)):
            caplog.clear()
            loaded = load_for_inference(config.train.run_dir)
            # The optimizer's files it does not read.
            damaged = not path.name.startswith("optimizer-")
            assert loaded.step == (GOOD if damaged else NEWEST)
            assert (path.name in caplog.text) == damaged


def train_on(config: Config, caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Train to the end in this process; returns all metrics."""
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        train(config, build_mesh(1), prepare(config), lambda metrics: None)
    return read_metrics(config.train.run_dir)


def test_training_passes_over_damage_in_any_file(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, path in enumerate(all_files(newest(config))):
        tree = config.model_dump(mode="json")
        tree["parallel"] = {}
        overrides = [f"train.name=copy-{number}", f"train.storage={tmp_path}", f"train.steps={NEWEST - 2}"]
        copy = build_config(tree, [*overrides, "checkpoint.keep_last=2"])
        shutil.copytree(config.train.run_dir, copy.train.run_dir)
        damaged = copy.train.run_dir / path.relative_to(config.train.run_dir)
        flip_somewhere(damaged, seed=number)
        before = {file.name: file.read_bytes() for file in damaged.parent.iterdir()}
        metrics = train_on(copy, caplog)
        assert f"{damaged.parent.name}/{damaged.name}" in caplog.text
        assert [m["resumed_step"] for m in metrics] == [0, 0, 0, 0, GOOD, GOOD]
        # Kept for a look at it, but neither newest nor one of the two that are kept.
        assert list_steps(open_storage(copy.train.run_dir)) == [GOOD, NEWEST - 2]
        before[DAMAGED] = before.pop(MANIFEST)
        assert {file.name: file.read_bytes() for file in damaged.parent.iterdir()} == before
        assert load_for_inference(copy.train.run_dir).step == NEWEST - 2


def test_a_damaged_manifest_in_between_pushes_out_nothing(
    copied: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config = build_config(copied.model_dump(mode="json"), ["train.steps=12", "checkpoint.every=6"])
    flip_somewhere(list_checkpoints(config.train.run_dir)[0] / MANIFEST)
    train_on(config, caplog)
    assert list_steps(open_storage(config.train.run_dir)) == [NEWEST, 12]
    assert (config.train.run_dir / "checkpoints" / f"step-{GOOD:08d}" / DAMAGED).exists()


def test_with_all_damaged_nothing_is_loaded_and_nothing_touched(
    copied: Config, caplog: pytest.LogCaptureFixture
) -> None:
    for checkpoint in list_checkpoints(copied.train.run_dir):
        flip_somewhere(next(checkpoint.glob("model-*")))
    before = {path: path.read_bytes() for path in copied.train.run_dir.rglob("*") if path.is_file()}
    for action in (
        lambda: train_on(copied, caplog),
        lambda: resolve_checkpoint(copied.train.run_dir),
        lambda: load_for_inference(copied.train.run_dir),
    ):
        with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged"):
            action()
    assert {path: path.read_bytes() for path in copied.train.run_dir.rglob("*") if path.is_file()} == before


def test_damage_in_an_object_store_is_found(
    config: Config, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = s3.fresh_uri()
    storage, source = open_storage(uri), open_storage(config.train.run_dir)
    for name in source.list():
        storage.write(name, source.read(name))
    assert resolve_checkpoint(uri, ALL_KINDS)[1].step == NEWEST
    shutil.rmtree(tmp_path / "cache")
    for path in all_files(newest(config)):
        name = path.relative_to(config.train.run_dir).as_posix()
        storage.write(name, flipped(path, path.stat().st_size // 2, 0))
        caplog.clear()
        assert resolve_checkpoint(uri, ALL_KINDS)[1].step == GOOD
        assert path.name in caplog.text
        shutil.rmtree(tmp_path / "cache")
        storage.write(name, path.read_bytes())
