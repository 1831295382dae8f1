"""Runs the steps that `step_model` predicts, on gloo ranks of one thread each, and counts what they send.

Shapes: B sequences, S tokens of each.
"""

import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ray.analytics.step_model import Hardware, Plan, step_seconds, transfers
from moe_ray.config import Config, DataConfig, TrainConfig
from moe_ray.cpu import keep_freed_memory
from moe_ray.data.batches import MicroBatch
from moe_ray.model_config import ModelConfig
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.optimizer import build_optimizer
from moe_ray.training.step import Trainer, train_step

GEMM_SIZE = 1024
COLLECTIVE_BYTES = 16 * 2**20
# A whole step without communication, of one large multiplication: docs/benchmarks.md, 8 experts, float32.
EFFICIENCY = 0.9
MODEL = ModelConfig(
    dim=512,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    vocab_size=4096,
    tie_embeddings=False,
    num_experts=8,
    top_k=2,
    expert_dim=1024,
    router="forced_balance",
)
PLANS = tuple(
    Plan(MODEL, world, ep, 4, 4, 256, "float32") for world, ep in ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4))
)


@contextmanager
def counted_bytes() -> Generator[dict[str, float]]:
    """Bytes that this rank sends to other ranks, by collective; an all-reduce counts as a ring's."""
    sent = {"all_to_all": 0.0, "all_reduce": 0.0}
    all_to_all, all_reduce = dist.all_to_all_single, dist.all_reduce

    def count_exchange(
        out: Tensor, rows: Tensor, received: Any = None, splits: Any = None, group: Any = None
    ) -> Any:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        kept = len(rows) / size if splits is None else splits[rank]
        sent["all_to_all"] += (len(rows) - kept) * math.prod(rows.shape[1:]) * rows.element_size()
        return all_to_all(out, rows, received, splits, group=group)

    def count_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> Any:
        size = dist.get_world_size(group)
        sent["all_reduce"] += 2 * tensor.nbytes * (size - 1) / size
        return all_reduce(tensor, op, group)

    with (
        mock.patch.object(dist, "all_to_all_single", count_exchange),
        mock.patch.object(dist, "all_reduce", count_reduce),
    ):
        yield sent


def predicted_bytes(plan: Plan) -> dict[str, float]:
    """What `counted_bytes` should find."""
    sent = transfers(plan)
    reduced = sum(sent[name].sent for name in ("dense", "experts", "statistics", "norm"))
    return {"all_to_all": sent["dispatch"].sent, "all_reduce": reduced}


def make_step(plan: Plan) -> Callable[[], float]:
    """One training step of this rank on random tokens; returns its seconds."""
    mesh = build_mesh(plan.ep)
    clock = PhaseClock(mesh.device, enabled=False)
    config = Config(
        data=DataConfig(sequence_length=plan.sequence_length),
        train=TrainConfig(
            global_batch=plan.sequences * plan.world, micro_batch=plan.micro_batch, dtype=plan.dtype
        ),
    ).model_copy(update={"model": plan.model})
    model = build_sharded_model(plan.model, 0, mesh, clock)
    trainer = Trainer(config, mesh, model, build_optimizer(model, config.optim), clock)
    tokens_BS = torch.randint(plan.model.vocab_size, (plan.sequences, plan.sequence_length))
    batches = [
        MicroBatch(part_BS, part_BS, torch.zeros(len(part_BS), dtype=torch.int64))
        for part_BS in tokens_BS.split(plan.micro_batch)
    ]

    def step() -> float:
        return seconds(lambda: train_step(trainer, batches, 1e-4))

    return step


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of a call that all ranks begin together."""
    _barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def measure(plan: Plan, rounds: int) -> dict[str, Any]:
    """Calibration and steps in turn; medians. Rank 0 multiplies and copies alone while the others wait."""
    step = make_step(plan)
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE)
    payload = torch.ones(COLLECTIVE_BYTES // 4)
    received = torch.empty_like(payload)
    step()
    with counted_bytes() as sent:
        step()
    times: dict[str, list[float]] = {"gemm": [], "copy": [], "all_reduce": [], "all_to_all": [], "step": []}
    alone = plan.world == 1 or dist.get_rank() == 0
    for _ in range(rounds):
        times["gemm"].append(seconds(lambda: [left @ right for _ in range(4)] if alone else None) / 4)
        times["copy"].append(seconds(lambda: received.copy_(payload) if alone else None))
        if plan.world > 1:
            times["all_reduce"].append(seconds(lambda: dist.all_reduce(payload.fill_(1.0))))
            times["all_to_all"].append(seconds(lambda: dist.all_to_all_single(received, payload)))
        times["step"].append(step())
    return {"seconds": {name: statistics.median(t) for name, t in times.items() if t}, "sent": dict(sent)}


def calibrated(plan: Plan, measured: dict[str, float]) -> Hardware:
    """This machine as it was while it was measured. Ranks beyond the cores share them."""
    crowding = max(1.0, plan.world / (os.cpu_count() or 1))
    moved = COLLECTIVE_BYTES * (plan.world - 1) / plan.world
    gloo = {
        name: times * moved / measured[name] for name, times in (("all_reduce", 2), ("all_to_all", 1)) if moved
    }
    return Hardware(
        peak_flops=2 * GEMM_SIZE**3 / measured["gemm"] / crowding,
        efficiency=EFFICIENCY,
        memory_bandwidth=2 * COLLECTIVE_BYTES / measured["copy"] / crowding,
        ranks_per_node=plan.world,
        intra_bandwidth=gloo.get("all_to_all", math.inf),
        # A ring's bandwidth is another one in gloo; `predicted_seconds` takes it for the gradients.
        inter_bandwidth=gloo.get("all_reduce", math.inf),
        latency=0.0,
        copy_bandwidth=math.inf,
        storage_bandwidth=math.inf,
    )


def predicted_seconds(plan: Plan, hardware: Hardware) -> dict[str, float]:
    """`step_seconds`, each collective with the bandwidth that was measured for it."""
    parts = step_seconds(plan, hardware)
    reduce = step_seconds(plan, replace(hardware, intra_bandwidth=hardware.inter_bandwidth))["reduce"]
    return parts | {"reduce": reduce}


def _enter(rank: int, plan: Plan, rounds: int, folder: str) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    if plan.world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=plan.world)
    Path(f"{folder}/{rank}.json").write_text(json.dumps(measure(plan, rounds)))
    _barrier()
    # An ordinary interpreter shutdown now and then aborts inside gloo's threads.
    os._exit(0)


def check(plan: Plan, rounds: int) -> dict[str, Any]:
    """Predicted and measured step and bytes of one plan, on processes of its own; the slowest rank counts."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [spawn.Process(target=_enter, args=(rank, plan, rounds, folder)) for rank in range(plan.world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        ranks = [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(plan.world)]
    measured = {name: max(rank["seconds"][name] for rank in ranks) for name in ranks[0]["seconds"]}
    hardware = calibrated(plan, measured)
    parts = predicted_seconds(plan, hardware)
    return {
        "world": plan.world,
        "ep": plan.ep,
        "gemm_gflops": 2 * GEMM_SIZE**3 / measured["gemm"] / 1e9,
        "all_reduce_gb_s": hardware.inter_bandwidth / 1e9 if plan.world > 1 else None,
        "all_to_all_gb_s": hardware.intra_bandwidth / 1e9 if plan.world > 1 else None,
        "predicted": parts,
        "predicted_seconds": sum(parts.values()),
        "measured_seconds": measured["step"],
        "predicted_bytes": predicted_bytes(plan),
        "counted_bytes": {
            kind: max(rank["sent"][kind] for rank in ranks) for kind in ("all_to_all", "all_reduce")
        },
    }
