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
    return [
        start_alone(_enter, rank, world_size, str(rendezvous), function, arguments) for rank in range(world_size)
    ]


def run_alone(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` in one process that is no member of a group and wait; fails if it does."""
    process = start_alone(function, *arguments)
    try:
        process.join(timeout=600)
        assert process.exitcode == 0
    finally:
        kill_world([process])


def start_alone(function: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start `function(*arguments)` in one process that is no member of a group and return it, running."""
    # Its parent has the environment of when it was itself started.
    process = _processes.Process(target=_enter_alone, args=(dict(os.environ), function, arguments))
    process.start()
    return process


def kill_world(world: Sequence[BaseProcess]) -> None:
    """SIGKILL what still runs, and reap it."""
    for process in world:
        process.kill()
    for process in world:
        process.join()


def _enter(rank: int, world_size: int, rendezvous: str, function: Callable[..., None], arguments: tuple) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    function(rank, *arguments)
    dist.barrier()
    # An ordinary interpreter shutdown now and then aborts inside gloo's threads.
    os._exit(0)


def _enter_alone(environment: dict[str, str], function: Callable[..., None], arguments: tuple) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*arguments)
