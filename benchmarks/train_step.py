"""Throughput and memory of a whole training step: forward, backward, clipping and AdamW.

Run `python benchmarks/train_step.py`; `--experts 64 --dtypes float32 --only ours transformers` runs a part of it.
Every contestant is a process of its own. They step in turn, round after round, each on the same fresh batch, so
that other load on the machine hits all alike; while one steps the others sleep.

- gemm: one 2048 x 2048 x 2048 multiplication, the ceiling of the machine.
- ours: `moe_ray.training.step.train_step` with two threads.
- balanced: the same with `model.router=forced_balance`, which takes imbalance out.
- ep=2: the same on two ranks with one thread each, which share the experts and the batch.
- dense: the same blocks with one dense feed-forward of the width that a token uses, top_k * expert_dim.
- transformers: MixtralForCausalLM with our weights, experts `grouped_mm`, attention `sdpa`, fused AdamW.

The first losses of all but `dense` and `balanced` must agree. FLOPs are the model's (`config.flops_per_token`);
memory is the largest resident size less the size after the imports: weights, gradients, AdamW's state,
activations, and for `ep=2` the sum over ranks. All keep freed memory (`moe_ray.cpu`).
"""

import argparse
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
from contestants import GEMM_SIZE, Case, contestant_model, make_step

from moe_ray.config import ModelConfig
from moe_ray.cpu import keep_freed_memory, set_threads

COMMON: dict[str, Any] = {
    "dim": 512,
    "num_layers": 2,
    "num_heads": 8,
    "num_kv_heads": 4,
    "vocab_size": 4096,
    "tie_embeddings": False,
}
SHAPES = {
    8: ModelConfig(**COMMON, num_experts=8, top_k=2, expert_dim=1024),
    64: ModelConfig(**COMMON, num_experts=64, top_k=8, expert_dim=128),
}
RANKS = {"gemm": 1, "ours": 1, "balanced": 1, "ep=2": 2, "dense": 1, "transformers": 1}
DTYPES = ("float32", "bfloat16")


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS and its maximum VmHWM."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def serve(name: str, rank: int, case: Case, threads: int, store: str, pipe: Connection) -> None:
    """Process of one rank: for each step number received sends (seconds, loss, peak bytes); None ends it."""
    keep_freed_memory()
    ranks = RANKS[name]
    set_threads(threads // ranks)
    if name == "transformers":
        import transformers.models.mixtral.modeling_mixtral  # noqa: F401
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    before = memory("VmRSS")
    step = make_step(name, case, ranks)
    while (number := pipe.recv()) is not None:
        windows = case.batch(number)
        start = time.perf_counter()
        loss = step(windows)
        pipe.send((time.perf_counter() - start, loss, memory("VmHWM") - before))
    if ranks > 1:
        dist.destroy_process_group()


def compare(case: Case, names: list[str], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of each round, first loss and peak bytes of every contestant."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes: dict[str, list[Connection]] = {}
        processes = []
        for name in names:
            for rank in range(RANKS[name]):
                mine, yours = spawn.Pipe()
                work = (name, rank, case, arguments.threads, f"{folder}/store", yours)
                processes.append(spawn.Process(target=serve, args=work, daemon=True))
                processes[-1].start()
                yours.close()
                pipes.setdefault(name, []).append(mine)
        results = {name: {"seconds": []} for name in names}
        for number in range(arguments.warmup + arguments.rounds):
            for name in names:
                for pipe in pipes[name]:
                    pipe.send(number)
                seconds, losses, peaks = zip(*(pipe.recv() for pipe in pipes[name]), strict=True)
                results[name].setdefault("first_loss", losses[0])
                results[name]["peak_bytes"] = sum(peaks)
                if number >= arguments.warmup:
                    results[name]["seconds"].append(max(seconds))
        for pipe in (pipe for ranks in pipes.values() for pipe in ranks):
            pipe.send(None)
        for process in processes:
            process.join()
    return results


def check_losses(results: dict[str, dict[str, Any]], dtype: str) -> None:
    """Assert that all who train the same model start with the same loss."""
    losses = {name: results[name]["first_loss"] for name in ("ours", "ep=2", "transformers") if name in results}
    spread = max(losses.values()) / min(losses.values()) - 1
    assert spread < (1e-5 if dtype == "float32" else 1e-3), f"first losses differ: {losses}"


def report(case: Case, results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Print the table of a case and return its rows."""
    gemm_flops = 2 * GEMM_SIZE**3 / statistics.median(results["gemm"]["seconds"])
    rows = []
    for name, result in results.items():
        if name == "gemm":
            continue
        low, median, high = (case.tokens / s for s in reversed(statistics.quantiles(result["seconds"], n=4)))
        flops = contestant_model(name, case.model).flops_per_token(case.sequence_length)
        pairs = zip(result["seconds"], results["ours"]["seconds"], strict=True)
        row = {
            "experts": case.model.num_experts,
            "top_k": case.model.top_k,
            "dtype": case.dtype,
            "contestant": name,
            "tokens_per_second": median,
            "quartiles": [low, high],
            "gflops": median * flops / 1e9,
            "gemm_gflops": gemm_flops / 1e9,
            "ours_faster_by": statistics.median(seconds / ours for seconds, ours in pairs),
            "peak_mb": result["peak_bytes"] / 1e6,
            "first_loss": result["first_loss"],
        }
        rows.append(row)
        print(
            f"{case.model.num_experts:3} top-{case.model.top_k} {case.dtype:9} {name:13}{median:7.0f} "
            f"({low:5.0f} to {high:5.0f}){median * flops / gemm_flops:7.0%}{row['ours_faster_by']:9.2f}x"
            f"{row['peak_mb']:9.0f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure all cases and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--only", nargs="+", choices=RANKS, default=list(RANKS), help="gemm and ours always run")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "train_step.json")
    arguments = parser.parse_args()

    names = [name for name in RANKS if name in {"gemm", "ours", *arguments.only}]
    print(f"{'':35}tokens/s (quartiles)    % GEMM  ours is  peak MB")
    rows = []
    for experts in arguments.experts:
        for dtype in arguments.dtypes:
            case = Case(SHAPES[experts], dtype, arguments.sequences, arguments.sequence_length)
            results = compare(case, names, arguments)
            rows += report(case, results)
            check_losses(results, dtype)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    environment = {"torch": torch.__version__, "threads": arguments.threads, "machine": platform.machine()}
    arguments.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"\nwrote {arguments.json}")


if __name__ == "__main__":
    main()
