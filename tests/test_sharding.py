"""Every layout of the parameters computes what one process computes, and its parts tile every tensor.

That one process computes what plain torch does is for test_parallel.py to show.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_ray.config import Config, ParallelConfig, build_config
from moe_ray.parallel.fsdp import predict
from moe_ray.parallel.grads import clip_gradients, reduce_gradients
from moe_ray.parallel.layout import Shard, copy_weights, init_optimizer_state, model_shards, optimizer_shards
from moe_ray.parallel.memory import held_bytes
from moe_ray.parallel.mesh import Mesh, build_mesh
from moe_ray.parallel.plan import plan_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.presets import PRESETS
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.optimizer import build_optimizer, learning_rate
from moe_ray.training.step import Trainer, accumulate_gradients, evaluate, train_step
from tests.test_parallel import global_batch, make_config, share
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


SHARDED = [(True, True), (True, False), (False, True)]
ALL_LAYOUTS = [(False, False), *SHARDED]
# Worlds and numbers of experts with the `ep` that divide both. 3 divides no dim of the model: of 2 experts the
# third rank holds nothing. 4 ranks cut 2 experts along their dims.
EPS = {(2, 8): [1, 2], (3, 2): [1], (4, 2): [1], (4, 8): [2]}
MORE_EPS = {(2, 6): [1, 2], (3, 6): [1, 3], (3, 8): [1], (4, 6): [1, 2], (4, 8): [1, 4]}
# What would make the result depend on how the batch is split, or the test slow.
TINY = {"num_experts": 8, "top_k": 2, "router_jitter": 0.0, "num_heads": 4}
TINY_PRESETS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_kv_heads": 4, "q_lora_rank": 16, "num_expert_groups": 4, "num_limited_groups": 2},
    "gpt_oss": {"head_dim": 16, "sliding_window": 5, "expert_dim": 24},
}


def gentle_config(**model: Any) -> Config:
    """Steps so small that they do not amplify rounding beyond the tolerance."""
    tree = make_config().model_dump(exclude_unset=True)
    tree["model"] |= model
    tree["optim"]["lr"] = 1e-3
    return build_config(tree)


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
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
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
    accumulate_gradients(trainer, share(config, 0, mesh.rank, mesh.world_size))
    reduce_gradients(trainer.model, mesh)
    record |= boxes("gradient", gradient_shards(trainer))
    record["norm"] = clip_gradients(trainer.model, mesh, config.optim.clip_norm)
    record |= boxes("clipped", gradient_shards(trainer))
    trainer.optimizer.zero_grad()
    for step in range(STEPS):
        batches = share(config, step, mesh.rank, mesh.world_size)
        result = train_step(trainer, batches, learning_rate(step, config.train.steps, config.optim))
        record[f"loss/{step}"], record[f"norm/{step}"] = torch.tensor(result.loss), torch.tensor(result.grad_norm)
        # Under no_grad nothing frees gathered weights but `predict`: the next step must not use stale ones.
        record[f"evaluation/{step}"] = evaluate(trainer.model, mesh, config.train.dtype, batches, num_domains=1)
    with torch.no_grad():
        record["logits"], _ = predict(trainer.model, global_batch(config, 99)[0])
    # First, because the state dict shards again what `predict` should have.
    record |= boxes("optimizer", optimizer_shards(trainer.model, trainer.optimizer, mesh))
    record |= boxes("state", model_shards(trainer.model, mesh))
    return record


def one_rank(rank: int, cases: list[Case], out_dir: Path) -> None:
    for case in cases:
        torch.save(
            record_training(case.config, build_mesh(case.config.parallel.ep)), out_dir / f"{case.name}.{rank}"
        )


def assemble(name: str, shards: list[Shard]) -> Tensor:
    """The whole tensor; its parts must cover each element as often as they say, with the same content."""
    shape = shards[0].shape
    whole, count = torch.zeros(shape), torch.zeros(shape)
    for shard in shards:
        assert shard.shape == shape, name
        box = tuple(slice(begin, begin + n) for begin, n in zip(shard.offset, shard.local.shape, strict=True))
        assert whole[box].shape == shard.local.shape, f"{name}: {shard.offset} is outside {shape}"
        assert ((count[box] == 0) | (whole[box] == shard.local)).all(), f"{name}: copies differ"
        whole[box] = shard.local.float()
        count[box] += 1
    (copies,) = {shard.copies for shard in shards if shard.local.numel()}
    assert (count == copies).all(), f"{name}: gaps or overlaps"
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


def cases_of(
    world_size: int, num_experts: int, eps: list[int], layouts_of_ep: Sequence[tuple[bool, bool]] = SHARDED
) -> list[Case]:
    config = gentle_config(num_experts=num_experts, top_k=2)
    layouts = [Layout(ep, *sharded) for ep in eps for sharded in layouts_of_ep]
    return [Case("-".join(map(str, layout)), with_layout(config, world_size, layout)) for layout in layouts]


@pytest.mark.parametrize(("world_size", "num_experts"), EPS)
def test_every_layout_equals_one_process(world_size: int, num_experts: int, tmp_path: Path) -> None:
    cases = cases_of(world_size, num_experts, EPS[world_size, num_experts])
    assert_equals_one_process(world_size, cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "num_experts"), MORE_EPS)
def test_more_layouts_equal_one_process(world_size: int, num_experts: int, tmp_path: Path) -> None:
    cases = cases_of(world_size, num_experts, MORE_EPS[world_size, num_experts])
    assert_equals_one_process(world_size, cases, tmp_path)


def test_every_preset_equals_one_process(tmp_path: Path) -> None:
    layout = Layout(ep=1, shard_dense=True, shard_experts=True)
    cases = [
        Case(preset, with_layout(gentle_config(preset=preset, **TINY | TINY_PRESETS.get(preset, {})), 2, layout))
        for preset in PRESETS
    ]
    assert_equals_one_process(2, cases, tmp_path)


def one_rank_of_bfloat16(rank: int, cases: list[Case], expected_loss: float) -> None:
    for case in cases:
        trainer = make_trainer(case.config, build_mesh(case.config.parallel.ep))
        result = train_step(trainer, share(case.config, 0, rank, 2), 1e-3)
        assert result.loss == pytest.approx(expected_loss, rel=2e-2)
        assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_bfloat16_computes_with_sharded_float32_parameters() -> None:
    cases = cases_of(2, 8, [1, 2])
    expected = train_step(
        make_trainer(cases[0].config.model_copy(update={"parallel": ParallelConfig()}), build_mesh(1)),
        share(cases[0].config, 0, 0, 1),
        1e-3,
    )
    bfloat16 = [
        Case(name, config.model_copy(update={"train": config.train.model_copy(update={"dtype": "bfloat16"})}))
        for name, config in cases
    ]
    run_world(2, one_rank_of_bfloat16, bfloat16, expected.loss)


def one_rank_of_memory(rank: int, cases: list[Case]) -> None:
    for case in cases:
        mesh = build_mesh(case.config.parallel.ep)
        trainer = make_trainer(case.config, mesh)
        batches = share(case.config, 0, rank, mesh.world_size)
        train_step(trainer, batches, 1e-3)
        accumulate_gradients(trainer, batches)
        reduce_gradients(trainer.model, mesh)
        step_counts = 4 * len(list(trainer.model.parameters()))
        held = held_bytes(trainer.model, trainer.optimizer) - step_counts
        predicted = plan_mesh(case.config, mesh.world_size, None).state_bytes
        if case.config.model.num_experts % mesh.world_size == 0:
            assert held == predicted, case.name
        elif rank == 0:
            # The world does not divide the rows of all tensors, and the first rank holds what is left over.
            assert predicted <= held <= 1.1 * predicted, f"{case.name}: {held} bytes, planned {predicted}"


@pytest.mark.parametrize(("world_size", "num_experts"), [(1, 8), *EPS])
def test_the_state_takes_the_memory_that_was_planned(world_size: int, num_experts: int) -> None:
    eps = EPS.get((world_size, num_experts), [1])
    run_world(world_size, one_rank_of_memory, cases_of(world_size, num_experts, eps, ALL_LAYOUTS))


def one_rank_of_loading(rank: int, cases: list[Case]) -> None:
    """What is written into the parts, as loading a checkpoint does, is what the model and optimizer have."""
    for case in cases:
        mesh = build_mesh(case.config.parallel.ep)
        stepped, loaded = make_trainer(case.config, mesh), make_trainer(case.config, mesh)
        train_step(stepped, share(case.config, 0, rank, mesh.world_size), 1e-3)
        init_optimizer_state(loaded.optimizer)
        shards, theirs = state_shards(loaded), state_shards(stepped)
        assert shards.keys() == theirs.keys()
        for name, shard in shards.items():
            assert (shard.offset, shard.shape, shard.copy) == (
                theirs[name].offset,
                theirs[name].shape,
                theirs[name].copy,
            )
            shard.local.copy_(theirs[name].local)
        for name, tensor in stepped.model.state_dict().items():
            assert torch.equal(full(loaded.model.state_dict()[name]), full(tensor)), name
        for mine, other in zip(loaded.model.parameters(), stepped.model.parameters(), strict=True):
            for key, tensor in stepped.optimizer.state[other].items():
                assert torch.equal(full(loaded.optimizer.state[mine][key]), full(tensor)), key
        results = [train_step(t, share(case.config, 1, rank, mesh.world_size), 1e-3) for t in (stepped, loaded)]
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)


def state_shards(trainer: Trainer) -> dict[str, Shard]:
    model = model_shards(trainer.model, trainer.mesh)
    return model | optimizer_shards(trainer.model, trainer.optimizer, trainer.mesh)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_what_is_written_into_the_parts_is_what_the_model_has() -> None:
    run_world(3, one_rank_of_loading, [*cases_of(3, 2, [1]), *cases_of(3, 6, [3])])


def one_rank_of_copying(rank: int, cases: list[Case]) -> None:
    for case in cases:
        mesh = build_mesh(case.config.parallel.ep)
        clock = PhaseClock(mesh.device, enabled=False)
        source = build_sharded_model(case.config.model, 1, mesh, clock)
        target = make_trainer(case.config, mesh).model
        copy_weights(source, target, mesh)
        for name, tensor in target.state_dict().items():
            assert torch.equal(full(tensor), source.state_dict()[name]), name


def test_weights_are_copied_into_a_sharded_model() -> None:
    run_world(3, one_rank_of_copying, [*cases_of(3, 2, [1]), *cases_of(3, 6, [3])])
