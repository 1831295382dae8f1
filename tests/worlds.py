"""Run a function in several real processes that form a gloo process group."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_processes = multiprocessing.get_context("forkserver")
# One process imports torch; the ranks are forked from it.
_processes.set_forkserver_preload(["torch._dynamo", "moe_ray.training.loop", "pytest"])


def run_world(world_size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` on every rank and wait; fails if any rank does."""
    world = start_world(world_size, function, *arguments)
    try:
        for process in world:
            process.join(timeout=600)
        assert [process.exitcode for process in world] == [0] * world_size
    finally:
        kill_world(world)


def start_world(world_size: int, function: Callable[..., None], *arguments: Any) -> list[BaseProcess]:
    """Start `function(rank, *arguments)` on every rank and return the running processes."""
    rendezvous = Path(tempfile.mkdtemp(prefix="rendezvous-")) / "store"
    world: list[BaseProcess] = [
        _processes.Process(target=_enter, args=(rank, world_size, str(rendezvous), function, arguments))
        for rank in range(world_size)
    ]
    for process in world:
        process.start()
    return world


def kill_world(world: Sequence[BaseProcess]) -> None:
    """SIGKILL what still runs, and reap it."""
    for process in world:
        process.kill()
    for process in world:
        process.join()


def _enter(rank: int, world_size: int, rendezvous: str, function: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    function(rank, *arguments)
    dist.barrier()
    # An ordinary interpreter shutdown now and then aborts inside gloo's threads.
    os._exit(0)
