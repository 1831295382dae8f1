"""A model and a corpus that train in a second, and a way to train them."""

import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_ray.config import Config
from moe_ray.data.prepare import prepare
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.plan import plan_mesh
from moe_ray.telemetry.run_log import read_metrics
from moe_ray.training.loop import train
from tests.worlds import run_world

_MODULES = ("argparse", "ast", "bisect", "calendar", "copy", "csv", "dis", "enum", "glob", "heapq", "tokenize")


def copy_corpus(folder: Path) -> Path:
    """Real text: some modules of the standard library, one file each."""
    for name in _MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", folder / f"{name}.txt")
    return folder


def tiny_settings(corpus: Path, storage: Path | str, name: str) -> dict[str, Any]:
    """Settings of a run of 12 steps of 6 sequences."""
    return {
        "model": {
            "vocab_size": 512,
            "dim": 64,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "num_experts": 4,
            "top_k": 2,
            "expert_dim": 64,
            "max_sequence_length": 64,
        },
        "data": {
            "sources": [f"code={corpus}/*.txt"],
            "sequence_length": 32,
            "validation_fraction": 0.2,
            "path": str(corpus / "prepared"),
        },
        "optim": {"lr": 5e-3, "warmup_steps": 2},
        "train": {
            "name": name,
            "storage": str(storage),
            "steps": 12,
            "global_batch": 6,
            "micro_batch": 2,
            "log_every": 1,
            "eval_every": 6,
            "eval_batches": 2,
        },
        "checkpoint": {"every": 4},
    }


def rank_main(rank: int, config: Config, data_dir: Path) -> None:
    """One rank of a training run, without Ray."""
    plan = plan_mesh(config, dist.get_world_size(), memory_bytes=None)
    train(config, build_mesh(plan.ep), data_dir, lambda metrics: None)


def run(config: Config) -> list[dict[str, Any]]:
    """Train to the end in `parallel.workers` processes; returns the logged metrics."""
    data_dir = prepare(config)
    config.train.run_dir.mkdir(parents=True, exist_ok=True)
    run_world(config.parallel.max_workers, rank_main, config, data_dir)
    return read_metrics(config.train.run_dir)
