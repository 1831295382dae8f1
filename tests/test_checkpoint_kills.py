"""Whatever moment a writer of checkpoints is killed at, the newest complete one is found and nothing else left."""

import functools
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_safetensors

from moe_ray.checkpoint.catalog import list_steps, newest_manifest, read_step, resolve_checkpoint, tidy
from moe_ray.checkpoint.manifest import MANIFEST
from moe_ray.config import Config, build_config
from moe_ray.data.prepare import prepare
from moe_ray.parallel.mesh import build_mesh
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.run_log import read_metrics
from moe_ray.training.loop import train
from tests.lives import KEPT, Mortal, fork, give_state, kill_at_file_event, live, state_of, tiny_trainer
from tests.s3_server import S3Server
from tests.tiny import copy_corpus, tiny_settings
from tests.worlds import kill_world, run_alone, start_alone

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = (1, 2, 3, 4)
ALL_KINDS = frozenset({"model", "optimizer", "tokenizer", "sidecar"})


@pytest.fixture
def fast_disk(tmp_path: Path) -> Iterator[Path]:
    """Where flushing costs nothing: a killed process, unlike a lost one of power, leaves the same on any disk."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="lives-", dir=memory if memory.is_dir() else tmp_path))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@functools.cache
def saved_files() -> dict[int, dict[str, bytes]]:
    """Content of each file of each step's checkpoint, from a life of which nothing was ever removed."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = tiny_trainer(keep_last=99)
        live(trainer, open_storage(folder), STEPS)
        saved = {}
        for step in STEPS:
            checkpoint = Path(folder, f"checkpoints/step-{step:08d}")
            names = {entry.name for entry in read_step(open_storage(folder), step).files}
            saved[step] = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name in names}
            assert_holds_the_state(saved[step], step)
        return saved


def assert_holds_the_state(files: dict[str, bytes], step: int) -> None:
    trainer = tiny_trainer()
    give_state(trainer, step)
    expected = {name: shard.local for name, shard in state_of(trainer).items()}
    found = {}
    for name, content in files.items():
        found |= load_safetensors(content) if name.endswith(".safetensors") else {}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def assert_newest_is(run: Storage, step: int) -> None:
    """It is whole and byte by byte what was saved, for those who only read and after the next start's tidying."""
    manifest = newest_manifest(run)
    assert (manifest.step if manifest else 0) == step
    tidied = False
    while True:
        if manifest is not None:
            folder, resolved = resolve_checkpoint(run.uri, ALL_KINDS)
            assert resolved == manifest
            assert {e.name: (folder / e.name).read_bytes() for e in resolved.files} == saved_files()[step]
        if tidied:
            return
        tidy(run, step)
        tidied = True


def assert_no_orphans(run: Storage) -> None:
    steps = list_steps(run)
    assert len(steps) <= KEPT + 1
    listed = set()
    for step in steps:
        names = [MANIFEST, *(entry.name for entry in read_step(run, step).files)]
        listed |= {f"checkpoints/step-{step:08d}/{name}" for name in names}
    assert set(run.list()) - {"attempt"} == listed
    if run.local is not None:
        on_disk = {path.relative_to(run.local).as_posix() for path in run.local.rglob("*")} - {"attempt"}
        folders = {parent.as_posix() for name in listed for parent in Path(name).parents} - {"."}
        assert on_disk == listed | folders


def lives_on_disk(folder: Path) -> None:
    """One life for each of its file operations, killed before it."""
    trainer = tiny_trainer()

    def one(point: int) -> None:
        run = folder / f"run-{point}"
        kill_at_file_event(point, run, folder / f"log-{point}")
        live(trainer, open_storage(run), STEPS)

    assert fork(one, 0) == 0
    for point in range(1, 1 + len((folder / "log-0").read_text().splitlines())):
        assert fork(one, point) == -signal.SIGKILL


def test_killed_before_each_file_operation(fast_disk: Path) -> None:
    run_alone(lives_on_disk, fast_disk)
    num_points = len((fast_disk / "log-0").read_text().splitlines())
    assert num_points >= 50
    found = []
    for point in range(1, num_points + 1):
        done = (fast_disk / f"log-{point}").read_text().splitlines()[:-1]
        step = sum(line.startswith("os.rename") and line.endswith(f"/{MANIFEST}") for line in done)
        run = open_storage(fast_disk / f"run-{point}")
        assert_newest_is(run, step)
        assert_no_orphans(run)
        found.append(step)
    assert found == sorted(found)
    assert set(found) == {0, *STEPS}


def live_with_a_large_file(folder: Path, size: int) -> None:
    live(tiny_trainer(), open_storage(folder), STEPS, extra=bytes(size))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_killed_in_the_middle_of_a_file(fast_disk: Path, share: float) -> None:
    size = 96 << 20

    def sizes() -> list[int]:
        sizes = []
        for path in fast_disk.glob("*/checkpoints/step-00000002/.tmp-*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        return sizes

    for attempt in range(20):
        folder = fast_disk / f"run-{attempt}"
        writer = start_alone(live_with_a_large_file, folder, size)
        try:
            deadline = time.monotonic() + 30
            while not any(found >= share * size for found in sizes()) and time.monotonic() < deadline:
                pass
        finally:
            kill_world([writer])
        left = sizes()
        run = open_storage(folder)
        if left and share * size <= left[0] < size:
            manifest = newest_manifest(run)
            assert manifest is not None
            assert manifest.step == 1
            assert resolve_checkpoint(folder, ALL_KINDS)[1] == manifest
            tidy(run, 1)
            assert_no_orphans(run)
            return
        shutil.rmtree(folder)
    pytest.fail("the writer was never killed within the file")


def lives_in_s3(uri: str, folder: Path, steps: tuple[int, ...], points: list[int]) -> None:
    """One life for each of the points, killed there. Each opens the storage itself: no client survives a fork."""
    trainer = tiny_trainer()

    def one(point: int) -> None:
        run = open_storage(under(uri, f"run-{point}"))
        live(trainer, Mortal(run, point, folder / f"log-{point}"), steps)

    for point in points:
        assert fork(one, point) == (-signal.SIGKILL if point else 0)


def under(uri: str, name: str) -> str:
    base, mark, query = uri.partition("?")
    return f"{base}/{name}{mark}{query}"


def sweep_s3(uri: str, folder: Path, steps: tuple[int, ...]) -> int:
    """Kill at every point; returns how many there are."""
    run_alone(lives_in_s3, uri, folder, steps, [0])
    num_points = len((folder / "log-0").read_text().splitlines())
    points = list(range(1, num_points + 1))
    halves = [start_alone(lives_in_s3, uri, folder, steps, half) for half in (points[::2], points[1::2])]
    try:
        for process in halves:
            process.join(timeout=600)
        assert [process.exitcode for process in halves] == [0, 0]
    finally:
        kill_world(halves)
    for point in points:
        done = (folder / f"log-{point}").read_text().splitlines()
        step = sum(line.startswith("after write") and line.endswith(MANIFEST) for line in done)
        run = open_storage(under(uri, f"run-{point}"))
        assert_newest_is(run, step)
        assert_no_orphans(run)
    return num_points


@pytest.mark.slow
def test_killed_before_and_after_each_operation_of_an_object_store(s3: S3Server, tmp_path: Path) -> None:
    assert sweep_s3(s3.fresh_uri(), tmp_path, (1, 2, 3)) >= 50


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_anywhere_in_a_longer_life_in_an_object_store(s3: S3Server, tmp_path: Path) -> None:
    assert sweep_s3(s3.fresh_uri(), tmp_path, STEPS) >= 80


@pytest.mark.parametrize("seed", range(3))
def test_killed_during_an_upload(breakable_s3: S3Server, seed: int) -> None:
    size = 16 << 20
    uri = breakable_s3.fresh_uri()
    breakable_s3.proxy.freeze_after(int(size * (1.05 + 0.9 * random.Random(seed).random())))
    writer = start_alone(live_with_a_large_file, uri, size)
    try:
        assert breakable_s3.proxy.broken.wait(60)
    finally:
        kill_world([writer])
    breakable_s3.proxy.mend()
    run = open_storage(uri)
    manifest = newest_manifest(run)
    assert manifest is not None
    assert manifest.step == 1
    assert resolve_checkpoint(uri, ALL_KINDS)[1] == manifest
    tidy(run, 1)
    assert_no_orphans(run)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


def short_run(corpus: Path, storage: Path | str, name: str, *overrides: str) -> Config:
    """8 steps, each second one saved."""
    settings = ("train.steps=8", "train.eval_every=8", "checkpoint.every=2", f"checkpoint.keep_last={KEPT}")
    return build_config(tiny_settings(corpus, storage, name), [*settings, *overrides])


def one_training(config: Config, data_dir: Path, point: int = 0, log: Path | None = None) -> None:
    if log is not None:
        kill_at_file_event(point, config.train.run_dir, log)
    train(config, build_mesh(1), data_dir, lambda metrics: None)


def trainings_on_disk(corpus: Path, data_dir: Path, folder: Path, num_points: int) -> None:
    """One run for each of some of its file operations: killed before it, and resumed."""
    whole = short_run(corpus, folder, "run-0")
    assert fork(one_training, whole, data_dir, 0, folder / "log-0") == 0
    points = range(1, 1 + len((folder / "log-0").read_text().splitlines()))
    for point in random.Random(num_points).sample(points, num_points):
        config = short_run(corpus, folder, f"run-{point}")
        assert fork(one_training, config, data_dir, point, folder / f"log-{point}") == -signal.SIGKILL
        assert fork(one_training, config, data_dir) == 0


@pytest.mark.parametrize(
    "num_points",
    [8, pytest.param(60, marks=[pytest.mark.slow, pytest.mark.exhaustive, pytest.mark.timeout(900)])],
)
def test_training_killed_anywhere_resumes_from_the_newest(corpus: Path, fast_disk: Path, num_points: int) -> None:
    data_dir = prepare(short_run(corpus, fast_disk, "run-0"))
    run_alone(trainings_on_disk, corpus, data_dir, fast_disk, num_points)
    undisturbed = [m["loss"] for m in read_metrics(fast_disk / "run-0")]
    runs = [path for path in fast_disk.glob("run-*") if path.name != "run-0"]
    assert len(runs) == num_points
    for path in runs:
        done = (fast_disk / path.name.replace("run", "log")).read_text().splitlines()[:-1]
        saved = 2 * sum(line.startswith("os.rename") and line.endswith(f"/{MANIFEST}") for line in done)
        metrics = read_metrics(path)
        assert [m["loss"] for m in metrics] == pytest.approx(undisturbed, rel=1e-6)
        assert [m["resumed_step"] for m in metrics] == [0] * saved + [saved] * (8 - saved)
        run = open_storage(path)
        assert list_steps(run) == [6, 8]
        leftovers = {name.split("/")[0] for name in run.list()} - {"attempt", "checkpoints", "metrics.jsonl"}
        assert not leftovers


def test_training_goes_on_while_the_network_is_cut(breakable_s3: S3Server, corpus: Path, tmp_path: Path) -> None:
    settings = ("checkpoint.retry_seconds=0.5", "checkpoint.max_failures=9")
    config = short_run(corpus, breakable_s3.fresh_uri(), "run", *settings)
    failures = []

    def report(metrics: dict) -> None:
        failures.append(metrics["failed_checkpoints"])
        if metrics["step"] == 3:
            breakable_s3.proxy.cut_after(100_000)
        if metrics["failed_checkpoints"]:
            breakable_s3.proxy.mend()

    train(config, build_mesh(1), prepare(config), report)
    assert failures[:6] == [0, 0, 0, 0, 1, 0]
    assert failures[-1] == 0
    run = open_storage(config.train.run_uri)
    assert list_steps(run) == [6, 8]
    assert [m["failed_checkpoints"] for m in read_metrics(run)] == failures
