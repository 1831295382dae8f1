"""Write checkpoints from all ranks while training goes on.

`begin` copies this rank's share of the state into memory and returns; a thread writes it. When all shares are
written, which the ranks learn from the sums that they exchange in each step anyway, rank 0 writes the manifest,
and the checkpoint exists. All ranks go through the same states at the same steps, so no message is sent for it.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

import torch
from pydantic import TypeAdapter
from torch import Tensor

from moe_ray.checkpoint.attempt import Attempt
from moe_ray.checkpoint.catalog import checkpoint_name, drop_unlisted, list_steps, read_step, remove
from moe_ray.checkpoint.manifest import (
    MANIFEST,
    TOKENIZER,
    FileEntry,
    FileKind,
    Manifest,
    Part,
    checksum_of,
    encode_manifest,
)
from moe_ray.checkpoint.retention import steps_to_keep
from moe_ray.checkpoint.snapshot import take_snapshot
from moe_ray.config import Config
from moe_ray.errors import CheckpointError, ConfigError, MoeRayError, StorageError
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.layout import Shard, model_shards, optimizer_shards
from moe_ray.parallel.mesh import Mesh
from moe_ray.storage import Storage

_logger = logging.getLogger(__name__)
_ENTRIES = TypeAdapter(list[FileEntry])
NUM_SIGNALS = 4


class Outcome(Enum):
    """What became of a checkpoint."""

    SAVED = "saved"
    FAILED = "failed"


@dataclass(frozen=True)
class Origin:
    """What the checkpoints of a run have in common.

    Attributes:
        config: the resolved settings.
        run: the storage of the run.
        attempt: this start of the workers; files carry its name, so that a process that was taken for dead
            cannot touch those of its successors.
        data_digest: identity of the training tokens, to be compared on resume.
        small_files: the tokenizer's, and those that came with the weights the run started from, by name.
    """

    config: Config
    run: Storage
    attempt: Attempt
    data_digest: str
    small_files: Mapping[str, bytes]


@dataclass
class _Pending:
    step: int
    metrics: Mapping[str, float]
    future: Future[None]
    logged: Future[None] | None
    is_publishing: bool = False
    began: float = field(default_factory=time.perf_counter)


class CheckpointWriter:
    """One for each rank; all ranks call its methods in the same order.

    Attributes:
        stall_seconds: for how long training stood still for the last checkpoint.
        write_seconds: how long the last one took to become visible.
        saved_step: of the newest checkpoint.
        saved_time: Unix time when it became visible, or when this start began if it has saved none yet.
        problem: why the last one failed, on a rank where it did.
    """

    def __init__(
        self, origin: Origin, mesh: Mesh, model: Transformer, optimizer: torch.optim.Optimizer, saved_step: int = 0
    ) -> None:
        self.stall_seconds = self.write_seconds = 0.0
        self.saved_step, self.saved_time = saved_step, time.time()
        self.problem: BaseException | None = None
        self._origin = origin
        self._mesh = mesh
        self._model = model
        self._optimizer = optimizer
        self._images: dict[FileKind, Tensor] = {}
        self._metrics: dict[int, Mapping[str, float]] = {}
        self._pending: _Pending | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=_yield_the_processor)
        # New pages cost several times the copy itself: before the first step rather than at the first checkpoint.
        self._copy_state()

    @property
    def pending_step(self) -> int | None:
        """The step whose checkpoint is being written."""
        return self._pending.step if self._pending else None

    def begin(self, step: int, metrics: Mapping[str, float], logged: Future[None] | None = None) -> Outcome | None:
        """Take the snapshot of `step` finished steps and start to write it; an earlier one is finished first.

        Args:
            logged: waited for, good or bad, before the checkpoint becomes visible.

        Returns:
            The outcome of the earlier one, if there was one.
        """
        started = time.perf_counter()
        earlier = self.finish()
        parts = self._copy_state()
        self._pending = _Pending(step, dict(metrics), self._thread.submit(self._write_share, step, parts), logged)
        self.stall_seconds = time.perf_counter() - started
        return earlier

    def signals(self) -> list[float]:
        """What this rank adds to the sums of the next exchange: NUM_SIGNALS numbers."""
        pending = self._pending
        if pending is None or not pending.future.done():
            return [0.0] * NUM_SIGNALS
        self.problem = pending.future.exception()
        good = [float(self.problem is None), float(self.problem is not None)]
        if not pending.is_publishing:
            return [*good, 0.0, 0.0]
        return [0.0, 0.0, *good] if self._mesh.rank == 0 else [0.0] * NUM_SIGNALS

    def advance(self, sums: Sequence[float]) -> Outcome | None:
        """Go on after an exchange.

        Args:
            sums: what `signals` returned, summed over the ranks.
        """
        written, failed, published, not_published = sums
        pending = self._pending
        if pending is None:
            return None
        if pending.is_publishing:
            ended = published + not_published > 0
            return self._end(Outcome.SAVED if published else Outcome.FAILED) if ended else None
        if written + failed < self._mesh.world_size:
            return None
        if failed:
            return self._end(Outcome.FAILED)
        pending.is_publishing = True
        pending.future = self._thread.submit(self._publish, pending)
        return None

    def finish(self) -> Outcome | None:
        """Wait until nothing is being written; returns the outcome of what was."""
        outcome = None
        while self._pending is not None:
            wait((self._pending.future,))
            sums = torch.tensor(self.signals(), dtype=torch.float64, device=self._mesh.device)
            outcome = self.advance(self._mesh.sum_over_world(sums).tolist())
        return outcome

    def close(self) -> None:
        """Wait until what failed is removed, too."""
        self._thread.shutdown()

    def _copy_state(self) -> dict[FileKind, dict[str, Part]]:
        shares: dict[FileKind, dict[str, Shard]] = {
            "model": _my_share(model_shards(self._model, self._mesh)),
            "optimizer": _my_share(optimizer_shards(self._model, self._optimizer, self._mesh)),
        }
        for kind, share in shares.items():
            tensors = {name: shard.local for name, shard in share.items()}
            self._images[kind] = take_snapshot(tensors, self._images.get(kind))
        return {kind: {name: _part(shard) for name, shard in share.items()} for kind, share in shares.items()}

    def _end(self, outcome: Outcome) -> Outcome:
        pending, self._pending = self._pending, None
        assert pending is not None
        self.write_seconds = time.perf_counter() - pending.began
        if outcome is Outcome.SAVED:
            self.saved_step, self.saved_time = pending.step, time.time()
        elif self._mesh.rank == 0:
            self._thread.submit(self._discard, pending.step)
        return outcome

    def _write_share(self, step: int, parts: Mapping[FileKind, Mapping[str, Part]]) -> None:
        folder, suffix = self._origin.run.child(checkpoint_name(step)), self._suffix(self._mesh.rank)
        entries = []
        for kind, tensors in parts.items():
            if tensors:
                content = memoryview(self._images[kind].numpy())
                entries.append(_write(folder, f"{kind}-{suffix}.safetensors", kind, content, tensors))
        if self._mesh.rank == 0:
            for name, content in self._origin.small_files.items():
                kind = "tokenizer" if name == TOKENIZER else "sidecar"
                entries.append(_write(folder, name, kind, memoryview(content)))
        folder.write(f"entries-{suffix}.json", _ENTRIES.dump_json(entries))

    def _publish(self, pending: _Pending) -> None:
        if self._mesh.rank != 0:
            return
        if pending.logged is not None:
            wait((pending.logged,))
        origin, step = self._origin, pending.step
        folder = origin.run.child(checkpoint_name(step))
        shares = [folder.read(f"entries-{self._suffix(rank)}.json") for rank in range(self._mesh.world_size)]
        files = [entry for share in shares for entry in _ENTRIES.validate_json(share)]
        sequences = step * origin.config.train.global_batch
        manifest = Manifest(
            step=step,
            tokens=sequences * origin.config.data.sequence_length,
            data_position=sequences,
            data_digest=origin.data_digest,
            rng_seed=origin.config.train.seed,
            world_size=self._mesh.world_size,
            ep=self._mesh.ep,
            metrics=pending.metrics,
            config=origin.config.model_dump(mode="json"),
            files=tuple(files),
        )
        origin.attempt.check()
        folder.write(MANIFEST, encode_manifest(manifest))
        # The checkpoint exists: what follows only makes room, and is made up for at the next one if it fails.
        try:
            self._make_room(folder, manifest)
        except (StorageError, ConfigError) as error:
            _logger.warning("old checkpoints could not be removed: %s", error.problem)

    def _make_room(self, folder: Storage, manifest: Manifest) -> None:
        run = self._origin.run
        self._origin.attempt.check()
        drop_unlisted(run, manifest, folder.list())
        self._metrics[manifest.step] = manifest.metrics
        # One with a damaged manifest neither counts nor goes: the next start sets it aside.
        metrics = {step: known for step in list_steps(run) if (known := self._metrics_of(step)) is not None}
        for step in sorted(metrics.keys() - steps_to_keep(metrics, self._origin.config.checkpoint)):
            remove(run, step)
            self._metrics.pop(step, None)

    def _metrics_of(self, step: int) -> Mapping[str, float] | None:
        if step not in self._metrics:
            try:
                self._metrics[step] = read_step(self._origin.run, step).metrics
            except CheckpointError:
                return None
        return self._metrics[step]

    def _discard(self, step: int) -> None:
        with suppress(MoeRayError):
            name = checkpoint_name(step)
            self._origin.attempt.check()
            if not self._origin.run.exists(f"{name}/{MANIFEST}"):
                self._origin.run.delete(name)

    def _suffix(self, rank: int) -> str:
        return f"{rank:05d}-{self._origin.attempt.name}"


def _my_share(shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """What this rank writes: of a part that several ranks hold each takes its turn, so that all write alike."""
    return {
        name: shard
        for number, (name, shard) in enumerate(shards.items())
        if number % shard.copies == shard.copy and shard.local.numel()
    }


def _part(shard: Shard) -> Part:
    return Part(offset=shard.offset, size=tuple(shard.local.shape), whole=shard.shape)


def _write(
    folder: Storage, name: str, kind: FileKind, content: memoryview, tensors: Mapping[str, Part] | None = None
) -> FileEntry:
    entry = FileEntry(
        name=name, kind=kind, size=content.nbytes, checksum=checksum_of(content), tensors=tensors or {}
    )
    folder.write(name, content)
    return entry


def _yield_the_processor() -> None:
    """Training comes first: on Linux a thread has a priority of its own."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
