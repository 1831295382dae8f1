"""The life of a checkpoint writer, and how to end it by SIGKILL at a chosen point."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moe_ray.checkpoint.attempt import Attempt
from moe_ray.checkpoint.writer import CheckpointWriter, Origin, Outcome
from moe_ray.config import Config, build_config
from moe_ray.parallel.layout import Shard, init_optimizer_state, model_shards, optimizer_shards
from moe_ray.parallel.mesh import Mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.storage import Storage
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.optimizer import build_optimizer
from moe_ray.training.step import Trainer

KEPT = 2
_FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir"})
_MODEL = {"vocab_size": 32, "dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "num_experts": 4}
_MODEL |= {"top_k": 2, "expert_dim": 16, "max_sequence_length": 16}
SMALL_FILES = {"tokenizer.json": b'{"a": 1}', "generation_config.json": b"{}"}
METRICS = {"val_loss": 1.0}


def tiny_trainer(keep_last: int = KEPT) -> Trainer:
    """Alone in its world."""
    tree = {"model": _MODEL, "data": {"sequence_length": 16}, "checkpoint": {"keep_last": keep_last}}
    config: Config = build_config(tree)
    mesh = Mesh(rank=0, world_size=1, ep=1, device=torch.device("cpu"))
    clock = PhaseClock(mesh.device, enabled=False)
    model = build_sharded_model(config.model, 0, mesh, clock)
    optimizer = build_optimizer(model, config.optim)
    init_optimizer_state(optimizer)
    return Trainer(config, mesh, model, optimizer, clock)


def state_of(trainer: Trainer) -> dict[str, Shard]:
    """All that a checkpoint holds of it, sharing memory with it."""
    return model_shards(trainer.model, trainer.mesh) | optimizer_shards(
        trainer.model, trainer.optimizer, trainer.mesh
    )


@torch.no_grad()
def give_state(trainer: Trainer, step: int) -> None:
    """A state that no other step has."""
    generator = torch.Generator().manual_seed(step)
    for shard in state_of(trainer).values():
        shard.local.copy_(torch.rand(shard.local.shape, generator=generator))


def live(trainer: Trainer, run: Storage, steps: Sequence[int], extra: bytes = b"") -> None:
    """Save a checkpoint of each step and make room for it.

    Args:
        extra: content of one more file.
    """
    files = SMALL_FILES | ({"extra.bin": extra} if extra else {})
    attempt = Attempt(run, "life", lambda: True)
    attempt.claim()
    origin = Origin(trainer.config, run, attempt, "digest", files)
    writer = CheckpointWriter(origin, trainer.mesh, trainer.model, trainer.optimizer)
    for step in steps:
        give_state(trainer, step)
        assert writer.begin(step, METRICS) is None
        assert writer.finish() is Outcome.SAVED


def fork(function: Callable[..., None], *arguments: Any) -> int:
    """Call `function(*arguments)` in a fork of this process; returns its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_file_event(point: int, folder: Path, log: Path) -> None:
    """Kill this process just before its n-th operation on files in a folder, from 1; 0: never.

    Args:
        log: gets a line for each operation, the one that did not happen included.
    """
    prefix, count = str(folder), 0
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in _FILE_EVENTS:
            return
        paths = list(_paths(event, arguments))
        if not any(path.startswith(prefix) for path in paths):
            return
        count += 1
        os.write(descriptor, f"{event} {' '.join(paths)}\n".encode())
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _paths(event: str, arguments: tuple) -> Iterator[str]:
    names, folders = arguments[:1], (-1,)
    if event == "os.rename":
        names, folders = arguments[:2], arguments[2:]
    elif event in ("os.remove", "os.rmdir", "os.mkdir"):
        folders = arguments[-1:]
    for name, folder in zip(names, folders, strict=True):
        if isinstance(name, str | os.PathLike):
            path = os.fspath(name)
            yield path if folder == -1 else f"{os.readlink(f'/proc/self/fd/{folder}')}/{path}"


@dataclass
class _Count:
    now: int = 0


@dataclass(frozen=True)
class Mortal:
    """A `Storage` that kills its process just before or just after one of its operations.

    Attributes:
        inner: does the work.
        point: of the moments before and after each operation, from 1, the one of death; 0: none.
        log: gets a line for each moment.
    """

    inner: Storage
    point: int
    log: Path
    count: _Count = field(default_factory=_Count)

    @property
    def uri(self) -> str:
        return self.inner.uri

    @property
    def local(self) -> Path | None:
        return self.inner.local

    def read(self, name: str) -> bytes:
        return self._do("read", name, lambda: self.inner.read(name))

    def write(self, name: str, content: bytes | memoryview) -> None:
        self._do("write", name, lambda: self.inner.write(name, content))

    def fetch(self, name: str, target: Path) -> None:
        self._do("fetch", name, lambda: self.inner.fetch(name, target))

    def list(self, folder: str = "") -> list[str]:
        return self._do("list", folder, lambda: self.inner.list(folder))

    def exists(self, name: str) -> bool:
        return self._do("exists", name, lambda: self.inner.exists(name))

    def delete(self, name: str) -> None:
        self._do("delete", name, lambda: self.inner.delete(name))

    def child(self, folder: str) -> "Mortal":
        return replace(self, inner=self.inner.child(folder))

    def clean(self) -> None:
        self._do("clean", "", self.inner.clean)

    def _do(self, deed: str, name: str, action: Callable[[], Any]) -> Any:
        self._pass(f"before {deed} {name}")
        result = action()
        self._pass(f"after {deed} {name}")
        return result

    def _pass(self, moment: str) -> None:
        self.count.now += 1
        with self.log.open("a") as log:
            log.write(f"{moment}\n")
        if self.count.now == self.point:
            os.kill(os.getpid(), signal.SIGKILL)
