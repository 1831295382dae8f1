"""Memory of the training state and seconds of a step, for every layout of the parameters.

Run `python benchmarks/memory.py`; `--worlds 4 --ep 2 --micro-batches 4` measures a part of it. The ranks of a
world are processes of one thread each that train all layouts in turn, round after round, on the same global batch,
so that other load on the machine hits all alike.

Predicted are the bytes of `moe_ray.parallel.plan`: parameters, gradients and AdamW's moments of one rank. Measured
are the storages that hold them, on the fullest rank, after a backward pass; step counts and the rows that FSDP2
pads make the difference. The step is relative to the replicated layout of the same world and `ep`.
"""

import argparse
import itertools
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_ray.config import Config, DataConfig, ParallelConfig, TrainConfig
from moe_ray.cpu import set_threads
from moe_ray.data.batches import MicroBatch
from moe_ray.model_config import ModelConfig
from moe_ray.parallel.grads import reduce_gradients
from moe_ray.parallel.memory import held_bytes
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.plan import plan_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.optimizer import build_optimizer
from moe_ray.training.step import Trainer, accumulate_gradients, train_step

MODEL = ModelConfig(dim=256, num_layers=4, num_heads=4, vocab_size=4096, num_experts=8, top_k=2, expert_dim=256)
NAMES = {
    (False, False): "replicated",
    (True, False): "shard_dense",
    (False, True): "shard_experts",
    (True, True): "both",
}
LR = 1e-4


def layouts(world_size: int, eps: list[int], arguments: argparse.Namespace) -> list[Config]:
    """Settings of the four layouts for each `ep` that divides the world."""
    data = DataConfig(sequence_length=arguments.sequence_length)
    sequences = arguments.sequences
    micro_batch = -(-sequences // (world_size * arguments.micro_batches))
    train = TrainConfig(global_batch=sequences, micro_batch=micro_batch, dtype=arguments.dtype)
    return [
        Config(
            model=MODEL,
            data=data,
            train=train,
            parallel=ParallelConfig(workers=world_size, ep=ep, shard_dense=dense, shard_experts=experts),
        )
        for ep, (dense, experts) in itertools.product(eps, NAMES)
        if world_size % ep == 0
    ]


def batches_of(config: Config, rank: int) -> list[MicroBatch]:
    """This rank's share of a random global batch."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.train.global_batch, config.data.sequence_length + 1)
    windows = torch.randint(MODEL.vocab_size, shape, generator=generator)
    mine = windows.tensor_split(config.parallel.max_workers)[rank]
    return [
        MicroBatch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), torch.zeros(len(part), dtype=torch.int64))
        for part in mine.split(config.train.micro_batch)
    ]


def measure(rank: int, configs: list[Config], rounds: int, store: str, pipe: Connection) -> None:
    """Process of one rank: sends its bytes and the seconds of each round for every layout."""
    set_threads(1)
    world_size = configs[0].parallel.max_workers
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    trainers, results = [], []
    for config in configs:
        mesh = build_mesh(plan_mesh(config, world_size, None).ep)
        clock = PhaseClock(mesh.device, enabled=False)
        model = build_sharded_model(MODEL, 0, mesh, clock, config.parallel)
        trainer = Trainer(config, mesh, model, build_optimizer(model, config.optim), clock)
        batches = batches_of(config, rank)
        loss = train_step(trainer, batches, LR).loss
        accumulate_gradients(trainer, batches)
        reduce_gradients(model, mesh)
        results.append({"bytes": held_bytes(model, trainer.optimizer), "first_loss": loss, "seconds": []})
        trainer.optimizer.zero_grad()
        trainers.append(trainer)
    for _ in range(rounds):
        for trainer, result in zip(trainers, results, strict=True):
            batches = batches_of(trainer.config, rank)
            start = time.perf_counter()
            train_step(trainer, batches, LR)
            result["seconds"].append(time.perf_counter() - start)
    pipe.send(results)
    if world_size > 1:
        dist.destroy_process_group()


def run_world(world_size: int, configs: list[Config], rounds: int) -> list[list[dict[str, Any]]]:
    """Results of all ranks."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            mine, yours = spawn.Pipe()
            work = (rank, configs, rounds, f"{folder}/store", yours)
            processes.append(spawn.Process(target=measure, args=work, daemon=True))
            processes[-1].start()
            yours.close()
            pipes.append(mine)
        results = [pipe.recv() for pipe in pipes]
        for process in processes:
            process.join()
    return results


def report(configs: list[Config], results: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Print the rows of a world and return them."""
    rows = []
    replicated: list[float] = []
    for config, ranks in zip(configs, zip(*results, strict=True), strict=True):
        parallel = config.parallel
        name = NAMES[parallel.shard_dense, parallel.shard_experts]
        seconds = [max(times) for times in zip(*(rank["seconds"] for rank in ranks), strict=True)]
        replicated = seconds if name == "replicated" else replicated
        plan = plan_mesh(config, parallel.max_workers, None)
        row = {
            "world": plan.world_size,
            "ep": plan.ep,
            "layout": name,
            "predicted_bytes": plan.state_bytes,
            "measured_bytes": max(rank["bytes"] for rank in ranks),
            "step_seconds": statistics.median(seconds),
            "relative_step": statistics.median(s / r for s, r in zip(seconds, replicated, strict=True)),
            "first_loss": ranks[0]["first_loss"],
        }
        rows.append(row)
        print(
            f"{plan.world_size:5}{plan.ep:4}  {name:14}{row['predicted_bytes'] / 2**20:10.2f}"
            f"{row['measured_bytes'] / 2**20:10.2f}{row['step_seconds']:9.3f}{row['relative_step']:9.2f}x",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure all worlds and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ep", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--micro-batches", type=int, default=1, help="forward passes of a rank in a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()

    print("world  ep  layout      predicted  measured MiB   step s  relative")
    rows = []
    for world_size in arguments.worlds:
        configs = layouts(world_size, arguments.ep, arguments)
        rows += report(configs, run_world(world_size, configs, arguments.rounds))
    losses = [row["first_loss"] for row in rows]
    assert max(losses) / min(losses) - 1 < 1e-5, f"first losses differ: {losses}"
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    environment = {"torch": torch.__version__, "machine": platform.machine()}
    arguments.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"\nwrote {arguments.json}")


if __name__ == "__main__":
    main()
