"""The model of scale: bytes as real ranks count them, and goodput within its limits."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from scaling_check import counted_bytes, make_step, predicted_bytes
from scaling_formulae import Checkpointing, Faults, checkpointing, outlook
from scaling_model import PROFILES

from moe_ray.analytics.step_model import Plan, step_seconds, transfers
from moe_ray.model_config import ModelConfig
from moe_ray.models.transformer import build_model
from moe_ray.parallel.shard import expert_parameter_names
from tests.worlds import run_world

MODEL = ModelConfig(
    vocab_size=64,
    dim=16,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    num_kv_heads=1,
    num_experts=8,
    top_k=2,
    expert_dim=24,
    expert_ffn_bias=True,
    max_sequence_length=16,
    router="forced_balance",
)
FAULTS = Faults(node_mtbf_hours=5e4, detect_seconds=60, restart_seconds=120, replace_seconds=1800)
CHECKPOINT = Checkpointing(stall=5.0, write=60.0, load=30.0)


def plan(world: int, ep: int, dtype: str = "float32") -> Plan:
    return Plan(MODEL, world, ep, sequences=3, micro_batch=2, sequence_length=16, dtype=dtype)


def count(rank: int, world: int, dtype: str, out_dir: Path) -> None:
    counts = {}
    for ep in (ep for ep in (1, 2, 4) if ep <= world):
        step = make_step(plan(world, ep, dtype))
        with counted_bytes() as sent:
            step()
        counts[ep] = sent
    (out_dir / f"{rank}.json").write_text(json.dumps(counts))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 4])
def test_predicted_bytes_are_those_that_ranks_send(world: int, dtype: str, tmp_path: Path) -> None:
    run_world(world, count, world, dtype, tmp_path)
    for rank in range(world):
        for ep, sent in json.loads((tmp_path / f"{rank}.json").read_text()).items():
            assert sent == pytest.approx(predicted_bytes(plan(world, int(ep), dtype)), rel=1e-12), (rank, ep)
            assert (sent["all_to_all"] > 0) == (int(ep) > 1)


def test_dense_and_expert_parameters_are_those_of_the_model() -> None:
    model = build_model(MODEL, 0)
    names = expert_parameter_names(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if name in names)
    assert plan(1, 1).expert_params == experts
    assert plan(1, 1).dense_params == sum(p.numel() for p in model.parameters()) - experts


def test_one_rank_sends_nothing() -> None:
    assert all(transfer.sent == 0 for transfer in transfers(plan(1, 1)).values())
    parts = step_seconds(plan(1, 1), PROFILES["h100"])
    assert parts["dispatch"] == parts["reduce"] == 0 < parts["compute"]


def test_sharding_sends_half_as_much_again_and_holds_less() -> None:
    whole = plan(8, 2)
    sharded = dataclasses.replace(whole, micro_batch=3, shard_dense=True, shard_experts=True)
    for name in ("dense", "experts"):
        assert transfers(sharded)[name].sent == pytest.approx(1.5 * transfers(whole)[name].sent)
    hardware = PROFILES["h100"]
    assert checkpointing(sharded, hardware, True).stall < checkpointing(whole, hardware, True).stall
    assert checkpointing(sharded, hardware, True).write == checkpointing(whole, hardware, True).write


def test_crossing_nodes_takes_longer() -> None:
    big = dataclasses.replace(plan(64, 8), model=MODEL.model_copy(update={"num_experts": 64, "dim": 1024}))
    inside = step_seconds(big, PROFILES["h100"])["dispatch"]
    assert step_seconds(dataclasses.replace(big, ep=16), PROFILES["h100"])["dispatch"] > 2 * inside


@pytest.mark.parametrize("nodes", [1, 8, 512, 100_000])
def test_goodput_is_a_share_that_falls_with_failures(nodes: int) -> None:
    hours = (math.inf, 1e6, 5e4, 6e3, 100, 1, 1e-3)
    shares = [outlook(CHECKPOINT, dataclasses.replace(FAULTS, node_mtbf_hours=h), nodes) for h in hours]
    for policy in ("static", "elastic"):
        values = [getattr(share, policy) for share in shares]
        assert values == sorted(values, reverse=True)
        assert values[0] == 1
        assert values[-1] == 0
    assert all(0 <= share.static <= share.elastic <= 1 for share in shares)


def test_elastic_gains_what_it_does_not_wait() -> None:
    one, many = outlook(CHECKPOINT, FAULTS, 1), outlook(CHECKPOINT, FAULTS, 512)
    assert one.static == one.elastic
    mtbf = 5e4 * 3600 / 512
    # 150 seconds of the second restart, and the share of one node for the time of the wait.
    assert many.elastic - many.static == pytest.approx((1800 - 1800 / 512 - 150) / mtbf)


def test_interval_is_youngs_and_best() -> None:
    found = outlook(CHECKPOINT, FAULTS, 512)
    mtbf = 5e4 * 3600 / 512
    assert found.interval == pytest.approx(math.sqrt(2 * 5.0 * mtbf))

    def overhead(interval: float) -> float:
        return 5.0 / interval + interval / 2 / mtbf

    around = torch.linspace(0.5, 2.0, 31).tolist()
    assert min(around, key=lambda factor: overhead(factor * found.interval)) == pytest.approx(1.0)
    assert outlook(dataclasses.replace(CHECKPOINT, write=1e5), FAULTS, 512).interval == 1e5
