"""Which checkpoints stay, how they move between worlds, what their files hold, what a full disk does to them."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from moe_ray.checkpoint.attempt import Attempt
from moe_ray.checkpoint.catalog import list_steps, resolve_checkpoint
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.checkpoint.load import load_shards
from moe_ray.checkpoint.manifest import FileKind
from moe_ray.checkpoint.snapshot import take_snapshot
from moe_ray.checkpoint.writer import CheckpointWriter, Origin, Outcome
from moe_ray.config import Config, build_config
from moe_ray.data.prepare import prepare
from moe_ray.errors import ConfigError, StorageError
from moe_ray.parallel.layout import Shard, init_optimizer_state, model_shards, optimizer_shards
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.storage import open_storage
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.telemetry.run_log import read_metrics
from moe_ray.training.launcher import run_training
from moe_ray.training.loop import Ended, train
from moe_ray.training.optimizer import build_optimizer
from moe_ray.training.requests import Request, ask
from moe_ray.training.step import Trainer
from tests.damage import Disk
from tests.tiny import copy_corpus, run, tiny_settings
from tests.worlds import run_world

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize(
    ("metric", "best_is"), [("loss", "lowest"), ("grad_norm", "highest"), ("val_loss", "lowest"), ("no", "lowest")]
)
def test_the_newest_the_round_and_the_best_are_kept(
    corpus: Path, tmp_path: Path, metric: str, best_is: str
) -> None:
    settings = [
        "checkpoint.every=1",
        "checkpoint.keep_last=2",
        "checkpoint.keep_every=5",
        "checkpoint.keep_best=2",
    ]
    settings += [f"checkpoint.best_metric={metric!r}", f"checkpoint.best_is={best_is}", "train.eval_every=1"]
    metrics = run(build_config(tiny_settings(corpus, tmp_path, "run"), settings))
    rated = sorted((m[metric], m["step"]) for m in metrics if metric in m)
    best = {step for _, step in (rated[:2] if best_is == "lowest" else rated[-2:])}
    assert len(best) == (0 if metric == "no" else 2)
    assert set(list_steps(open_storage(tmp_path / "run"))) == {5, 10, 11, 12} | best


def test_the_best_are_so_by_a_number_that_runs_log(corpus: Path, tmp_path: Path) -> None:
    config = build_config(tiny_settings(corpus, tmp_path, "run"), ["checkpoint.best_metric=val_los"])
    with pytest.raises(ConfigError, match=r"checkpoint.best_metric names 'val_los'.*did you mean 'val_loss'"):
        run_training(config)


def test_resumed_runs_remember_how_good_old_checkpoints_were(corpus: Path, tmp_path: Path) -> None:
    settings = ["checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.keep_best=1", "train.eval_every=1"]
    settings += ["checkpoint.best_metric=loss", "checkpoint.best_is=highest"]
    for steps in (4, 8):
        metrics = run(build_config(tiny_settings(corpus, tmp_path, "run"), [*settings, f"train.steps={steps}"]))
    worst = max(metrics, key=lambda m: m["loss"])["step"]
    # In the process that trains last nothing has seen how good it was.
    assert worst <= 4
    assert list_steps(open_storage(tmp_path / "run")) == [worst, 8]


class Layout(NamedTuple):
    experts: int
    world: int
    ep: int
    shard_dense: bool = False
    shard_experts: bool = False


# All pairs of those with equally many experts.
LAYOUTS = [
    Layout(8, 1, 1),
    Layout(8, 2, 2),
    Layout(8, 2, 1, True, False),
    Layout(8, 2, 2, True, True),
    Layout(8, 4, 4),
    Layout(8, 4, 2, True, True),
    Layout(8, 4, 1, False, True),
    Layout(6, 1, 1),
    Layout(6, 2, 2, True, False),
    Layout(6, 3, 3),
    Layout(6, 3, 1, True, True),
    Layout(6, 3, 3, True, True),
    Layout(6, 4, 2, False, True),
]


def build_trainer(layout: Layout) -> Trainer:
    model = {"vocab_size": 40, "dim": 24, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "expert_dim": 16}
    model |= {"num_experts": layout.experts, "score_func": "sigmoid", "expert_bias": True}
    parallel = {"workers": layout.world, "ep": layout.ep}
    parallel |= {"shard_dense": layout.shard_dense, "shard_experts": layout.shard_experts}
    config = build_config({"model": model, "parallel": parallel})
    mesh = build_mesh(layout.ep)
    clock = PhaseClock(mesh.device, enabled=False)
    model = build_sharded_model(config.model, 0, mesh, clock, config.parallel)
    optimizer = build_optimizer(model, config.optim)
    init_optimizer_state(optimizer)
    return Trainer(config, mesh, model, optimizer, clock)


def shards_of(trainer: Trainer) -> dict[FileKind, Mapping[str, Shard]]:
    return {
        "model": model_shards(trainer.model, trainer.mesh),
        "optimizer": optimizer_shards(trainer.model, trainer.optimizer, trainer.mesh),
    }


def part_of_state(name: str, shard: Shard) -> Tensor:
    """What belongs there: each whole tensor has content of its own, wherever it lies."""
    whole = torch.rand(shard.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    box = tuple(slice(begin, begin + n) for begin, n in zip(shard.offset, shard.local.shape, strict=True))
    return whole[box].to(shard.local.dtype)


@torch.no_grad()
def one_rank_of_saving(rank: int, layouts: list[Layout], folder: Path) -> None:
    for layout in layouts:
        trainer = build_trainer(layout)
        for shards in shards_of(trainer).values():
            for name, shard in shards.items():
                shard.local.copy_(part_of_state(name, shard))
        run = open_storage(folder / str(LAYOUTS.index(layout)))
        attempt = Attempt(run, "a", lambda: True)
        attempt.claim()
        origin = Origin(trainer.config, run, attempt, "", {})
        writer = CheckpointWriter(origin, trainer.mesh, trainer.model, trainer.optimizer)
        writer.begin(1, {})
        assert writer.finish() is Outcome.SAVED


@torch.no_grad()
def one_rank_of_loading(rank: int, layouts: list[Layout], folder: Path) -> None:
    for layout in layouts:
        trainer = build_trainer(layout)
        for number, source in enumerate(LAYOUTS):
            if source.experts != layout.experts:
                continue
            path, manifest = resolve_checkpoint(folder / str(number), frozenset({"model", "optimizer"}))
            for kind, shards in shards_of(trainer).items():
                assert kind == "optimizer" or any(name.endswith("expert_bias_E") for name in shards)
                assert kind == "optimizer" or any(name.endswith("load_fraction_E") for name in shards)
                for shard in shards.values():
                    shard.local.fill_(-1)
                load_shards(path, manifest, kind, shards)
                for name, shard in shards.items():
                    assert torch.equal(shard.local, part_of_state(name, shard)), f"{source} to {layout}: {name}"


def test_the_state_moves_between_all_layouts_bit_by_bit(tmp_path: Path) -> None:
    for one_rank in (one_rank_of_saving, one_rank_of_loading):
        for world in (1, 2, 3, 4):
            run_world(world, one_rank, [layout for layout in LAYOUTS if layout.world == world], tmp_path)


def one_rank_of_a_leg(rank: int, config: Config, data_dir: Path, last: int) -> None:
    """Train until a step is logged, and end with the one after it."""

    def report(metrics: dict[str, Any]) -> None:
        if rank == 0 and metrics["step"] == last - 1 and last < config.train.steps:
            ask(Request.STOP)

    ended = train(config, build_mesh(int(config.parallel.ep)), data_dir, report)
    assert ended == Ended(last, None if last == config.train.steps else Request.STOP)


@pytest.mark.parametrize(
    "legs",
    [
        [(2, "parallel.ep=2"), (3, "parallel.shard_dense=true parallel.shard_experts=true"), (1, "")],
        pytest.param(
            [(4, "parallel.ep=2 parallel.shard_experts=true"), (1, ""), (3, "parallel.ep=3")],
            marks=pytest.mark.slow,
        ),
        pytest.param([(3, "parallel.ep=3 parallel.shard_dense=true"), (2, ""), (4, "")], marks=pytest.mark.slow),
    ],
    ids=lambda legs: "-".join(str(world) for world, _ in legs),
)
def test_a_run_that_moves_goes_where_it_would_have_gone(
    corpus: Path, tmp_path: Path, legs: list[tuple[int, str]]
) -> None:
    base = ["model.num_experts=6", "model.score_func=sigmoid", "model.expert_bias=true", "checkpoint.every=100"]
    undisturbed = run(build_config(tiny_settings(corpus, tmp_path, "undisturbed"), base))
    for (world, layout), last in zip(legs, (4, 9, 12), strict=True):
        overrides = [*base, f"parallel.workers={world}", *layout.split()]
        config = build_config(tiny_settings(corpus, tmp_path, "moved"), overrides)
        run_world(world, one_rank_of_a_leg, config, prepare(config), last)
    moved = read_metrics(tmp_path / "moved")
    assert [m["world_size"] for m in moved] == [legs[0][0]] * 4 + [legs[1][0]] * 5 + [legs[2][0]] * 3
    for exact in ("step", "tokens", "lr", "sample_checksum"):
        assert [m[exact] for m in moved] == [m[exact] for m in undisturbed]
    assert len({m["sample_checksum"] for m in moved}) == 12
    for close in ("loss", "grad_norm"):
        assert [m[close] for m in moved] == pytest.approx([m[close] for m in undisturbed], rel=1e-4)
    weights, expected = (
        load_for_inference(tmp_path / name).model.state_dict() for name in ("moved", "undisturbed")
    )
    for name, tensor in expected.items():
        error = (weights[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert error < 1e-4, f"{name} is off by {error:.1e}"


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)


def drawn(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Any bits, those of infinities and of all kinds of NaN among them."""
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    size = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_snapshots_are_safetensors_files(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = None
    for _ in range(2):
        tensors, prefix = {}, 'ä"/' * seed
        for number, dtype in enumerate(DTYPES):
            for shape in ((), (1,), (0, 3), (3, 0), (3, 5), (2, 3, 7)):
                tensors[f"{prefix}{dtype}-{number}-{shape}"] = drawn(shape, dtype, generator)
            tensors[f"{dtype} turned"] = drawn((4, 6), dtype, generator).T[1:, ::2]
        before = image
        image = take_snapshot(tensors, image)
        assert before is None or image.data_ptr() == before.data_ptr()
        found = load_safetensors(image.numpy().tobytes())
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert bits(found[name]) == bits(tensor), name


def test_snapshots_of_nothing_and_of_one_scalar_are_files_too() -> None:
    assert load_safetensors(take_snapshot({}).numpy().tobytes()) == {}
    scalar = take_snapshot({"step": torch.tensor(3.0)}, take_snapshot({}))
    assert load_safetensors(scalar.numpy().tobytes()) == {"step": torch.tensor(3.0)}


def test_training_goes_on_while_the_disk_is_full(corpus: Path, small_disk: Path) -> None:
    disk, failures = Disk(small_disk), []
    settings = ["train.steps=10", "checkpoint.every=2", "checkpoint.keep_last=2"]
    settings += ["checkpoint.max_failures=9"]
    config = build_config(tiny_settings(corpus, small_disk, "run"), settings)

    def report(metrics: dict[str, Any]) -> None:
        failures.append(metrics["failed_checkpoints"])
        if metrics["step"] == 3:
            disk.fill()
        if metrics["failed_checkpoints"]:
            disk.free()

    train(config, build_mesh(1), prepare(config), report)
    assert failures[:6] == [0, 0, 0, 0, 1, 0]
    assert failures[-1] == 0
    storage = open_storage(config.train.run_dir)
    assert list_steps(storage) == [8, 10]
    assert {name.split("/")[1] for name in storage.list("checkpoints")} == {"step-00000008", "step-00000010"}
    assert [m["step"] for m in read_metrics(storage)] == list(range(1, 11))


def test_too_many_failures_in_a_row_end_training(corpus: Path, small_disk: Path) -> None:
    disk, failures = Disk(small_disk), []
    settings = ["checkpoint.every=2", "checkpoint.max_failures=2"]
    config = build_config(tiny_settings(corpus, small_disk, "run"), settings)

    def report(metrics: dict[str, Any]) -> None:
        failures.append(metrics["failed_checkpoints"])
        if metrics["step"] == 3:
            disk.fill()

    with pytest.raises(StorageError, match=r"2 checkpoints in a row .*No space left.*Fix: free space"):
        train(config, build_mesh(1), prepare(config), report)
    assert max(failures) == 1
    disk.free()
    storage = open_storage(config.train.run_dir)
    assert list_steps(storage) == [2]
    train(config, build_mesh(1), prepare(config), lambda metrics: None)
    assert list_steps(storage)[-1] == 12
    assert [m["step"] for m in read_metrics(storage)] == list(range(1, 13))
