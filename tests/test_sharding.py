"""Every layout of the parameters computes what one process computes, and its parts tile every tensor.

That one process computes what plain torch does is for test_parallel.py to show.
"""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from moe_ray.config import Config, ParallelConfig
from moe_ray.parallel.fsdp import predict
from moe_ray.parallel.grads import clip_gradients, reduce_gradients
from moe_ray.parallel.layout import Shard, init_optimizer_state, model_shards, optimizer_shards
from moe_ray.parallel.memory import held_bytes
from moe_ray.parallel.mesh import Mesh, build_mesh
from moe_ray.parallel.plan import plan_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.optimizer import build_optimizer, learning_rate
from moe_ray.training.step import Trainer, accumulate_gradients, evaluate, train_step
from tests.test_parallel import VARIANTS, global_batch, make_config, share
from tests.worlds import run_world

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 3
TOLERANCE = 1e-5


class Layout(NamedTuple):
    ep: int
    shard_dense: bool
    shard_experts: bool


class Case(NamedTuple):
    name: str
    config: Config
    layout: Layout


SHARDED = [(True, True), (True, False), (False, True)]
EPS = {(2, 8): [1, 2], (2, 6): [1, 2], (3, 8): [1], (3, 6): [1, 3], (4, 8): [1, 2, 4], (4, 6): [1, 2]}


def with_experts(config: Config, num_experts: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"num_experts": num_experts})})


def with_layout(config: Config, world_size: int, layout: Layout) -> Config:
    parallel = ParallelConfig(workers=world_size, **layout._asdict())
    return config.model_copy(update={"parallel": parallel})


def boxes(kind: str, shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """A copy of the state of now."""
    return {
        f"{kind}/{name}": Shard(shard.local.detach().clone(), shard.offset, shard.shape, shard.copy, shard.copies)
        for name, shard in shards.items()
    }


def gradient_shards(trainer: Trainer) -> dict[str, Shard]:
    """Gradients lie as their parameters do."""
    places = model_shards(trainer.model, trainer.mesh)
    shards = {}
    for name, parameter in trainer.model.named_parameters():
        gradient = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        place = places[name]
        shards[name] = Shard(gradient, place.offset, place.shape, place.copy, place.copies)
    return shards


def make_trainer(config: Config, mesh: Mesh) -> Trainer:
    clock = PhaseClock(mesh.device, enabled=False)
    model = build_sharded_model(config.model, config.train.seed, mesh, clock, config.parallel)
    return Trainer(config, mesh, model, build_optimizer(model, config.optim), clock)


def record_training(config: Config, mesh: Mesh) -> dict[str, Shard | Tensor]:
    """What a rank has seen and holds before, during and after three steps."""
    trainer = make_trainer(config, mesh)
    record: dict[str, Any] = boxes("initial", model_shards(trainer.model, mesh))
    for step in range(STEPS):
        batches = share(config, step, mesh.rank, mesh.world_size)
        accumulate_gradients(trainer, batches)
        reduce_gradients(trainer.model, mesh)
        record |= boxes(f"gradient/{step}", gradient_shards(trainer))
        record[f"norm/{step}"] = clip_gradients(trainer.model, mesh, config.optim.clip_norm)
        trainer.optimizer.zero_grad()
        result = train_step(trainer, batches, learning_rate(step, config.train.steps, config.optim))
        record[f"loss/{step}"] = torch.tensor(result.loss)
        # Under no_grad nothing frees gathered weights but `predict`: the next step must not use stale ones.
        sums_2M = evaluate(trainer.model, mesh, config.train.dtype, batches, num_domains=1)
        record[f"evaluation/{step}"] = sums_2M
    with torch.no_grad():
        record["logits"], _ = predict(trainer.model, global_batch(config, 99)[0])
    record |= boxes("state", model_shards(trainer.model, mesh))
    record |= boxes("optimizer", optimizer_shards(trainer.model, trainer.optimizer, mesh))
    return record


def one_rank(rank: int, cases: list[Case], out_dir: Path) -> None:
    for case in cases:
        torch.save(record_training(case.config, build_mesh(case.layout.ep)), out_dir / f"{case.name}.{rank}")


def assemble(name: str, shards: list[Shard]) -> Tensor:
    """The whole tensor; its parts must cover each element as often as they say, with the same content."""
    shape = shards[0].shape
    whole, count = torch.zeros(shape), torch.zeros(shape)
    for shard in shards:
        assert shard.shape == shape, name
        box = tuple(slice(begin, begin + size) for begin, size in zip(shard.offset, shard.local.shape, strict=True))
        assert whole[box].shape == shard.local.shape, f"{name}: {shard.offset} is outside {shape}"
        assert ((count[box] == 0) | (whole[box] == shard.local)).all(), f"{name}: copies differ"
        whole[box] = shard.local.float()
        count[box] += 1
    copies = {shard.copies for shard in shards if shard.local.numel()}
    assert len(copies) == 1 and (count == copies.pop()).all(), f"{name}: gaps or overlaps"
    parts = [(shard.offset, shard.copy) for shard in shards if shard.local.numel()]
    assert len(set(parts)) == len(parts), f"{name}: two ranks are the same copy"
    return whole


def assert_equals_one_process(world_size: int, cases: list[Case], out_dir: Path) -> None:
    run_world(world_size, one_rank, cases, out_dir)
    references: dict[Any, dict[str, Any]] = {}
    for case in cases:
        if case.config.model not in references:
            alone = case.config.model_copy(update={"parallel": ParallelConfig()})
            references[case.config.model] = record_training(alone, build_mesh(1))
        records = [torch.load(out_dir / f"{case.name}.{rank}", weights_only=False) for rank in range(world_size)]
        for name, expected in references[case.config.model].items():
            found = [record[name] for record in records]
            if isinstance(expected, Shard):
                assert_close(f"{case.name}: {name}", assemble(f"{case.name}: {name}", found), expected.local)
            else:
                for actual in found:
                    assert_close(f"{case.name}: {name}", actual, expected)


def assert_close(name: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, name
    error = (actual - expected).float().norm() / expected.float().norm().clamp(min=1e-12)
    assert error < TOLERANCE, f"{name} is off by {error:.2e} relative"


def cases_of(world_size: int, num_experts: int, layouts: list[tuple[bool, bool]]) -> list[Case]:
    config = with_experts(make_config(), num_experts)
    layouts_of_world = [Layout(ep, *sharded) for ep in EPS[world_size, num_experts] for sharded in layouts]
    return [
        Case(f"ep{layout.ep}-{layout.shard_dense}-{layout.shard_experts}", with_layout(config, world_size, layout), layout)
        for layout in layouts_of_world
    ]


@pytest.mark.parametrize(("world_size", "num_experts"), EPS)
def test_every_layout_equals_one_process(world_size: int, num_experts: int, tmp_path: Path) -> None:
    assert_equals_one_process(world_size, cases_of(world_size, num_experts, SHARDED), tmp_path)
