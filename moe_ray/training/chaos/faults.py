"""Each fault: how it strikes a run, or why it cannot."""

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_ray.checkpoint.catalog import checkpoint_name, list_steps, read_step
from moe_ray.config import Config
from moe_ray.storage import Storage
from moe_ray.training.chaos import cluster
from moe_ray.training.chaos.process import TrainJob
from moe_ray.training.chaos.proxy import Proxy
from moe_ray.training.chaos.schedule import Fault

_FILLER = "chaos-filler"
_CHUNK = b"\0" * (1 << 16)


class NotPossibleError(Exception):
    """The fault cannot strike here; the message says why."""


@dataclass(frozen=True)
class Options:
    """How hard faults strike.

    Attributes:
        outage_seconds: how long a disk is full or storage is cut off.
        drain_seconds: from the announcement to the end of a node.
        full_disk_bytes: a file system with more free bytes than this is not filled.
    """

    outage_seconds: float = 5.0
    drain_seconds: int = 15
    full_disk_bytes: int = 64 << 20


@dataclass(frozen=True)
class Stage:
    """What faults act upon.

    Attributes:
        run: the run's storage, never through `proxy`.
        proxy: between the run and its object store; None without one.
        draw: chooses victims.
        cleanup: takes what must be undone when the job ends.
        logs: folder for the output of processes.
    """

    config: Config
    options: Options
    run: Storage
    job: TrainJob
    proxy: Proxy | None
    draw: np.random.Generator
    cleanup: ExitStack
    logs: Path

    def workers(self) -> list[cluster.Worker]:
        """Those that train now.

        Raises:
            NotPossibleError: there are none.
        """
        workers = cluster.workers_of(self.job.pid)
        if not workers:
            raise NotPossibleError("no worker was found")
        return workers


@dataclass(frozen=True)
class Hit:
    """When a fault struck, in seconds since the epoch, whom, and the step of the checkpoint that it damaged."""

    time: float
    note: str
    damaged_step: int | None = None


def strike(fault: Fault, stage: Stage) -> Hit:
    """Let a fault strike; outages are over when this returns.

    Raises:
        NotPossibleError: it cannot strike here.
    """
    return _STRIKES[fault](stage)


def _signal_one(number: int) -> Callable[[Stage], Hit]:
    def act(stage: Stage) -> Hit:
        workers = stage.workers()
        victim = _choose(stage, workers)
        return Hit(cluster.send_signal([victim], number), f"worker {victim.pid} of {len(workers)}")

    return act


def _kill_driver(stage: Stage) -> Hit:
    pid, now = stage.job.pid, time.time()
    stage.job.restart()
    return Hit(now, f"driver {pid}")


def _drain_node(stage: Stage) -> Hit:
    node_id, seconds = _spare_node(stage), stage.options.drain_seconds
    try:
        return Hit(cluster.drain(node_id, seconds), f"node {node_id[:8]} goes in {seconds} s")
    except RuntimeError as error:
        raise NotPossibleError(f"the cluster refuses to drain a node: {error}") from None


def _lose_node(stage: Stage) -> Hit:
    node_id = _spare_node(stage)
    return Hit(cluster.lose(node_id), f"node {node_id[:8]}")


def _spare_node(stage: Stage) -> str:
    nodes = cluster.spare_nodes(stage.job.pid, stage.workers(), stage.config.parallel.min_workers)
    if not nodes:
        raise NotPossibleError("no node can go: parallel.workers could not be kept without it")
    return str(stage.draw.choice(nodes))


def _add_node(stage: Stage) -> Hit:
    parallel, count = stage.config.parallel, len(stage.workers())
    if not cluster.is_on_one_machine():
        raise NotPossibleError("the cluster is on several machines")
    if count >= parallel.max_workers:
        raise NotPossibleError(f"the world has all {count} workers of parallel.workers")
    if parallel.use_gpu:
        raise NotPossibleError("a node more on this machine has no GPU more")
    process = cluster.start_node(math.ceil(parallel.cpus_per_worker), stage.logs / "node.log")
    stage.cleanup.callback(cluster.end_tree, process)
    return Hit(time.time(), "a node on this machine")


def _damage(change: Callable[[bytes], bytes]) -> Callable[[Stage], Hit]:
    def act(stage: Stage) -> Hit:
        workers = stage.workers()
        victim = _choose(stage, workers)
        # Standing still, they cannot publish a newer checkpoint before the damaged one is read.
        cluster.send_signal(workers, signal.SIGSTOP)
        try:
            step, name = _newest_file(stage)
            stage.run.write(name, change(stage.run.read(name)))
            now = cluster.send_signal([victim], signal.SIGKILL)
        finally:
            others = [worker for worker in workers if worker != victim]
            if others:
                cluster.send_signal(others, signal.SIGCONT)
        return Hit(now, f"{Path(name).name} of step {step}, worker {victim.pid}", step)

    return act


def _newest_file(stage: Stage) -> tuple[int, str]:
    steps = list_steps(stage.run)
    if len(steps) < 2:
        raise NotPossibleError("there is no checkpoint before the newest one")
    names = sorted(entry.name for entry in read_step(stage.run, steps[-1]).files if entry.kind == "model")
    return steps[-1], f"{checkpoint_name(steps[-1])}/{names[int(stage.draw.integers(len(names)))]}"


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _halve(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _fill_disk(stage: Stage) -> Hit:
    if stage.run.local is None:
        raise NotPossibleError("the storage is no disk")
    folder = stage.run.local.parent
    free = os.statvfs(folder)
    num_bytes, limit = free.f_bavail * free.f_frsize, stage.options.full_disk_bytes
    if num_bytes > limit:
        raise NotPossibleError(f"{num_bytes >> 20} MiB are free, more than {limit >> 20} to be filled")
    filler, now = folder / _FILLER, time.time()
    until = now + stage.options.outage_seconds
    try:
        while time.time() < until:
            _fill(filler)
            # What the run removes meanwhile is taken, too.
            time.sleep(0.05)
    finally:
        filler.unlink(missing_ok=True)
    return Hit(now, f"for {stage.options.outage_seconds:g} s")


def _fill(filler: Path) -> None:
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.write(_CHUNK):
            pass


def _cut_storage(stage: Stage) -> Hit:
    if stage.proxy is None:
        raise NotPossibleError("train.storage is no s3:// with scheme=http and endpoint_override")
    now = time.time()
    stage.proxy.cut()
    try:
        time.sleep(stage.options.outage_seconds)
    finally:
        stage.proxy.mend()
    return Hit(now, f"for {stage.options.outage_seconds:g} s")


def _choose(stage: Stage, workers: Sequence[cluster.Worker]) -> cluster.Worker:
    return workers[int(stage.draw.integers(len(workers)))]


_STRIKES: dict[Fault, Callable[[Stage], Hit]] = {
    Fault.KILL_WORKER: _signal_one(signal.SIGKILL),
    Fault.STOP_WORKER: _signal_one(signal.SIGSTOP),
    Fault.TERM_WORKER: _signal_one(signal.SIGTERM),
    Fault.KILL_DRIVER: _kill_driver,
    Fault.DRAIN_NODE: _drain_node,
    Fault.LOSE_NODE: _lose_node,
    Fault.ADD_NODE: _add_node,
    Fault.CORRUPT_CHECKPOINT: _damage(_flip),
    Fault.TRUNCATE_CHECKPOINT: _damage(_halve),
    Fault.FULL_DISK: _fill_disk,
    Fault.CUT_STORAGE: _cut_storage,
}
