"""The mesh that planning chooses, without any process group."""

import logging
import math
from typing import Any

import psutil
import pytest
import torch

from moe_ray.config import Config, build_config
from moe_ray.model_config import ModelConfig
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.plan import Plan, best_world, describe, plan_mesh, worker_memory
from moe_ray.presets import PRESETS


def make_config(num_experts: int = 8, workers: Any = (1, 64), **parallel: Any) -> Config:
    model = {"num_experts": num_experts, "dim": 64, "expert_dim": 64, "vocab_size": 512, "top_k": 2}
    return build_config({"model": model, "parallel": {"workers": workers, **parallel}})


@pytest.mark.parametrize(
    ("num_experts", "ep", "world_size", "chosen"),
    [
        *((8, "auto", world, ep) for world, ep in {1: 1, 2: 2, 3: 1, 4: 4, 5: 1, 6: 2, 7: 1, 8: 8, 16: 8}.items()),
        *((6, "auto", world, ep) for world, ep in {1: 1, 2: 2, 3: 3, 4: 2, 5: 1, 6: 6, 9: 3, 12: 6}.items()),
        *((8, 4, world, ep) for world, ep in {1: 1, 2: 2, 3: 1, 4: 4, 6: 2, 8: 4, 12: 4}.items()),
        *((8, 3, world, ep) for world, ep in {3: 1, 4: 2, 8: 2}.items()),
        (8, 1, 8, 1),
    ],
)
def test_ep_is_the_largest_common_divisor_that_is_allowed(
    num_experts: int, ep: Any, world_size: int, chosen: int
) -> None:
    plan = plan_mesh(make_config(num_experts, ep=ep), world_size, None)
    assert (plan.world_size, plan.ep, plan.dp, plan.fits) == (world_size, chosen, world_size // chosen, True)


def state_bytes(config: Config, world_size: int, ep: int) -> float:
    """16 bytes a parameter."""
    model, parallel = config.model, config.parallel
    experts = model.num_expert_params() / ep
    dense = model.num_params() - model.num_expert_params()
    if parallel.shard_dense:
        dense /= world_size
    if parallel.shard_experts:
        experts /= world_size / ep
    return 16 * (dense + experts)


@pytest.mark.parametrize("shard_dense", [False, True])
@pytest.mark.parametrize("shard_experts", [False, True])
@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_state_is_sixteen_bytes_a_parameter(shard_dense: bool, shard_experts: bool, ep: int) -> None:
    config = make_config(ep=ep, shard_dense=shard_dense, shard_experts=shard_experts)
    assert plan_mesh(config, 8, None).state_bytes == state_bytes(config, 8, ep)


@pytest.mark.parametrize(("room_for", "chosen"), [(1, 1), (2, 2), (4, 4), (8, 8)])
def test_ep_grows_until_it_fits(room_for: int, chosen: int) -> None:
    config = make_config(ep=1)
    plan = plan_mesh(config, 8, int(state_bytes(config, 8, room_for)))
    assert plan.ep == chosen
    assert plan.fits


def test_a_world_that_does_not_fit_is_planned_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(ep=1)
    with caplog.at_level(logging.WARNING):
        plan = plan_mesh(config, 4, int(state_bytes(config, 4, 4)) - 1)
    assert (plan.ep, plan.fits) == (4, False)
    assert "world 4 = dp 1 x ep 4" in caplog.text
    assert "Fix: set parallel.shard_dense" in caplog.text


def test_what_fits_is_planned_silently(caplog: pytest.LogCaptureFixture) -> None:
    plan_mesh(make_config(ep="auto"), 4, 2**40)
    assert caplog.text == ""


def test_the_best_world_is_the_largest_that_fits(caplog: pytest.LogCaptureFixture) -> None:
    config = make_config(ep="auto")
    assert best_world(config, 7, None) == 7
    # 7 and 5 ranks share nothing of 8 experts, 6 ranks halve them.
    assert best_world(config, 7, int(state_bytes(config, 6, 2))) == 6
    assert best_world(config, 7, int(state_bytes(config, 4, 4))) == 4
    assert best_world(config, 7, 1) == 7
    assert best_world(make_config(ep="auto", workers=(5, 8)), 7, int(state_bytes(config, 4, 4))) == 7
    assert caplog.text == ""


def test_experts_that_nothing_divides_are_cut_between_whole_ones() -> None:
    config = make_config(num_experts=8, shard_experts=True)
    assert plan_mesh(config, 3, None).expert_bytes == 4 * config.model.num_expert_params() * 3 // 8
    assert plan_mesh(config, 16, None).expert_bytes == 4 * config.model.num_expert_params() // 16


@pytest.mark.parametrize("preset", PRESETS)
def test_expert_parameters_are_counted(preset: str) -> None:
    config = ModelConfig(preset=preset, dim=64, num_heads=2, num_kv_heads=2)
    with torch.device("meta"):
        model = Transformer(config)
    experts = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    assert config.num_expert_params() == sum(p.numel() for module in experts for p in module.parameters())
    assert config.num_params() == sum(p.numel() for p in model.parameters())


def test_description() -> None:
    plan = Plan(world_size=4, ep=2, dense_bytes=3 * 2**20, expert_bytes=2**19, fits=True)
    assert describe(plan) == (
        "world 4 = dp 2 x ep 2; per rank 3.0 MiB dense + 0.5 MiB experts, 14.0 MiB with gradients and AdamW"
    )


def test_a_worker_on_a_cpu_has_its_share_of_the_node() -> None:
    assert worker_memory(torch.device("cpu"), 4) == math.floor(psutil.virtual_memory().total / 4)
    assert worker_memory(torch.device("meta"), 1) is None
