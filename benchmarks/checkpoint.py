"""What checkpoints cost: the stall of training for each, and the throughput with one every 20 steps.

Run `python benchmarks/checkpoint.py`; `--storage s3://…` writes elsewhere than to a temporary folder. One process
trains the same model twice, in turn: with a checkpoint every 20 steps, and with none but the last. The state is
float32 weights and AdamW's two moments, 12 bytes a parameter.

The stall is what `CheckpointWriter.begin` takes: the copy of the state to memory. A step that ends while the
checkpoint is still being written waits for it, if `checkpoint.overlap_steps` is 1; the throughput shows that.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from moe_ray.config import Config, build_config
from moe_ray.cpu import keep_freed_memory, set_threads
from moe_ray.data.prepare import prepare
from moe_ray.parallel.mesh import build_mesh
from moe_ray.training.loop import train

EVERY = 20


def make_config(arguments: argparse.Namespace, folder: Path, name: str, every: int) -> Config:
    """A run of two checkpoints' length."""
    model = {"vocab_size": 4096, "dim": 512, "num_layers": 4, "num_heads": 8, "num_experts": 8, "top_k": 2}
    train = {"steps": 2 * EVERY + 5, "global_batch": 16, "micro_batch": 8, "log_every": 1, "eval_every": 10**6}
    tree: dict[str, Any] = {
        "model": {**model, "expert_dim": arguments.expert_dim},
        "data": {"path": str(folder / "data")},
        "optim": {"warmup_steps": 5},
        "train": {**train, "name": name, "storage": arguments.storage or str(folder), "dtype": arguments.dtype},
        "checkpoint": {"every": every, "keep_last": 1, "overlap_steps": arguments.overlap_steps},
    }
    return build_config(tree)


def measure(config: Config) -> list[dict[str, Any]]:
    """Metrics of each step, without the first ones, which warm up."""
    collected: list[dict[str, Any]] = []
    train(config, build_mesh(1), prepare(config), collected.append)
    return collected[3:]


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write it as JSON."""
    keep_freed_memory()
    set_threads(os.cpu_count() or 1)
    shares, throughputs, stalls, writes, steps = [], [], [], [], []
    config = None
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as name:
        folder = Path(name)
        for number in range(arguments.rounds):
            config = make_config(arguments, folder, f"with-{number}", EVERY)
            saved = measure(config)
            plain = measure(make_config(arguments, folder, f"without-{number}", 10**6))
            step = statistics.median(m["step_seconds"] for m in plain)
            stalls += sorted({m["checkpoint_stall_seconds"] for m in saved} - {0.0})
            writes += sorted({m["checkpoint_write_seconds"] for m in saved} - {0.0})
            steps.append(step)
            shares.append(statistics.median(stalls) / step)
            # Logged steps do not count what happens between them: the clock of the log does.
            spans = [run[-1]["time"] - run[0]["time"] for run in (saved, plain)]
            throughputs.append(spans[1] / spans[0])
    assert config is not None
    state_mb = 12 * config.model.num_params() / 1e6
    print("| state | step | stall | stall / step | write | throughput with / without |")
    print("|---:|---:|---:|---:|---:|---:|")
    print(
        f"| {state_mb:.0f} MB | {statistics.median(steps):.2f} s | {statistics.median(stalls) * 1e3:.0f} ms "
        f"| {statistics.median(shares):.1%} | {statistics.median(writes):.2f} s "
        f"| {statistics.median(throughputs):.1%} |"
    )
    print("targets: stall at most 5% of a step, throughput at least 95%")
    results = Path("benchmarks/results")
    results.mkdir(exist_ok=True)
    record = {"state_mb": state_mb, "steps": steps, "stalls": stalls, "writes": writes, "throughput": throughputs}
    (results / "checkpoint.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--expert-dim", type=int, default=768)
    parser.add_argument("--overlap-steps", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--storage", help="a folder or URL; default: a temporary folder")
    main(parser.parse_args())
