"""Run a function in several real processes that form a gloo process group."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# One process imports torch; the ranks are forked from it.
multiprocessing.set_forkserver_preload(["torch._dynamo", "moe_ray.training.step", "pytest"])


def run_world(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` on every rank; raises what the first failing rank raised."""
    with tempfile.NamedTemporaryFile() as rendezvous:
        mp.start_processes(
            _enter,
            (world_size, rendezvous.name, function, arguments),
            nprocs=world_size,
            start_method="forkserver",
        )


def _enter(rank: int, world_size: int, rendezvous: str, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    function(rank, *arguments)
    dist.barrier()
    # An ordinary interpreter shutdown now and then aborts inside gloo's threads.
    os._exit(0)
