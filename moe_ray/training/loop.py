"""The training loop of one rank: restore, step, evaluate, save, report. Knows the process group but not Ray."""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_ray.checkpoint.attempt import Attempt
from moe_ray.checkpoint.manifest import TOKENIZER
from moe_ray.checkpoint.writer import NUM_SIGNALS, CheckpointWriter, Origin, Outcome
from moe_ray.config import Config
from moe_ray.data.batches import MicroBatch, micro_batches, train_batch
from moe_ray.data.reader import TokenData, open_data
from moe_ray.errors import ANOTHER_RANK, MoeRayError, StorageError, TrainingError, UserError
from moe_ray.parallel.layout import init_optimizer_state
from moe_ray.parallel.mesh import Mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.telemetry.logs import set_log_fields
from moe_ray.telemetry.run_log import RunLog, read_metrics
from moe_ray.training.held_out import held_out_batches, validation_metrics
from moe_ray.training.measure import (
    Interval,
    LoadTrend,
    LossTrend,
    numbers,
    sample_checksum,
    step_metrics,
    wrap_checksum,
)
from moe_ray.training.optimizer import build_optimizer, learning_rate
from moe_ray.training.requests import Request, answered, asked, heaviest
from moe_ray.training.restore import restore
from moe_ray.training.resume import small_files
from moe_ray.training.step import StepResult, Trainer, evaluate, train_step

_logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Ended:
    """How training ended.

    Attributes:
        step: finished steps; the newest checkpoint is of them.
        request: what ended it early.
    """

    step: int
    request: Request | None = None


def train(
    config: Config,
    mesh: Mesh,
    data_dir: Path,
    report: Report,
    may_publish: Callable[[], bool] = lambda: True,
) -> Ended:
    """Train from the newest good checkpoint, or from the start, to `train.last_step` or until asked to end.

    Args:
        mesh: this rank's place; every rank of it runs this function.
        data_dir: the prepared token shards.
        report: called on every rank with the metrics of each logged step.
        may_publish: asked on rank 0 before a checkpoint becomes visible: whether this job still trains the run.

    Raises:
        CheckpointError: all checkpoints of the run are damaged, or they are of another architecture.
        ConfigError: another job trains the run.
        OutOfMemoryError: a step needs more memory than there is.
        StorageError: too many checkpoints in a row could not be written.
        TrainingError: too many steps in a row were not finite.
    """
    began = time.perf_counter()
    run = open_storage(config.train.run_uri, config.checkpoint.retry_seconds)
    clock = PhaseClock(mesh.device, enabled=False)
    model = build_sharded_model(config.model, config.train.seed, mesh, clock, config.parallel)
    optimizer = build_optimizer(model, config.optim)
    init_optimizer_state(optimizer)
    trainer = Trainer(config, mesh, model, optimizer, clock)
    data = open_data(data_dir, config.data.sequence_length)
    attempt = Attempt(run, _name_attempt(mesh), may_publish)
    restored = restore(trainer, run, data, attempt.claim)
    files = small_files(config, run, restored.step, data.folder / TOKENIZER)
    origin = Origin(config, run, attempt, data.index.digest, files)
    constants = {
        "resumed_step": restored.step,
        "redone_steps": restored.redone_steps,
        "restore_seconds": time.perf_counter() - began,
    }
    writer = CheckpointWriter(origin, mesh, model, optimizer, restored.step)
    loop = _Loop(trainer, data, run, writer, report, constants)
    for step in range(restored.step, config.train.last_step):
        request = loop.step(step)
        if request is not None and request is not Request.SAVE:
            loop.close()
            return Ended(step + 1, request)
    loop.close()
    return Ended(config.train.last_step)


def _name_attempt(mesh: Mesh) -> str:
    """A name that all ranks of this start have in common and no other start has."""
    drawn = secrets.randbits(48) if mesh.rank == 0 else 0
    return f"{int(mesh.sum_over_world(torch.tensor(drawn, device=mesh.device))):012x}"


class _Loop:
    """The state of the loop between two steps."""

    def __init__(
        self,
        trainer: Trainer,
        data: TokenData,
        run: Storage,
        writer: CheckpointWriter,
        report: Report,
        constants: dict[str, float],
    ) -> None:
        self._trainer = trainer
        self._data = data
        self._writer = writer
        self._report = report
        self._constants = constants
        is_first = trainer.mesh.rank == 0
        self._log = RunLog(run) if is_first else None
        self._trend = LossTrend(logged.get("loss") for logged in read_metrics(run)) if is_first else None
        self._load_trend = LoadTrend(trainer.config.model)
        self._interval = Interval()
        self._latest: dict[str, float] = {}
        self._bad_steps = self._failed_saves = self._last_try = 0

    def step(self, step: int) -> Request | None:
        """Do one step and what is due after it; returns a request that was answered by a checkpoint."""
        config, mesh, clock = self._trainer.config, self._trainer.mesh, self._trainer.clock
        started, done = time.perf_counter(), step + 1
        set_log_fields(step=done)
        evaluates = done == config.train.last_step or done % config.train.eval_every == 0
        clock.enabled = evaluates or done % config.train.log_every == 0
        # The generator's state is a function of seed, step and rank, so checkpoints need not hold it.
        torch.manual_seed(((config.train.seed * 1_000_003 + step) * 65_537 + mesh.rank) % 2**63)
        with clock.phase("data"):
            batches = _train_batches(config, self._data, step, mesh)
        lr = learning_rate(step, config.train.steps, config.optim)
        signals = [*self._writer.signals(), *asked(), sample_checksum(batches)]
        try:
            result = train_step(self._trainer, batches, lr, signals, partial(self._follow_checkpoint, done))
        except TrainingError as error:
            raise type(error)(f"step {done}: {error.problem}", error.fix) from None
        self._interval.add(result, time.perf_counter() - started)
        if clock.enabled:
            self._log_step(done, lr, result, evaluates)
        self._check_finite(result, done)
        request = heaviest(result.signals[NUM_SIGNALS:-1])
        self._save_if_due(done, request)
        return request

    def _follow_checkpoint(self, done: int, sums: Sequence[float]) -> None:
        """Before the update of a step: one that waited for it later would be lost with it."""
        self._settle(self._writer.advance(sums[:NUM_SIGNALS]))
        pending, overlap = self._writer.pending_step, self._trainer.config.checkpoint.overlap_steps
        if pending is not None and done - pending >= overlap:
            self._settle(self._writer.finish())

    def close(self) -> None:
        """Write what is left of the metrics, and remove what is left of a failed checkpoint."""
        self._writer.close()
        if self._log is not None:
            self._log.close()

    def _log_step(self, done: int, lr: float, result: StepResult, evaluates: bool) -> None:
        metrics = step_metrics(self._trainer, done, lr, result, self._interval)
        metrics["sample_checksum"] = wrap_checksum(result.signals[-1])
        metrics["collapse_by_layer"] = self._load_trend.add(metrics["load_by_layer"], self._interval.steps)
        if self._trend is not None:
            metrics["loss_over_best"] = self._trend.add(metrics["loss"])
        metrics["checkpoint_step"] = self._writer.saved_step
        metrics["checkpoint_time"] = self._writer.saved_time
        metrics["checkpoint_stall_seconds"] = self._writer.stall_seconds
        metrics["checkpoint_write_seconds"] = self._writer.write_seconds
        metrics["failed_checkpoints"] = self._failed_saves
        metrics |= self._constants
        if evaluates:
            metrics |= self._evaluate()
        if self._log is not None:
            self._log.append(metrics)
        self._report(metrics)
        self._latest |= numbers(metrics)
        self._interval = Interval()

    def _evaluate(self) -> dict[str, Any]:
        train, mesh = self._trainer.config.train, self._trainer.mesh
        batches = held_out_batches(self._data, mesh, train.global_batch, train.eval_batches, train.micro_batch)
        sums_2M = evaluate(self._trainer.model, mesh, train.dtype, batches, len(self._data.domains))
        return validation_metrics(sums_2M, self._data.domains)

    def _check_finite(self, result: StepResult, done: int) -> None:
        if result.is_finite:
            self._bad_steps = 0
            return
        self._bad_steps += 1
        train = self._trainer.config.train
        where = f"step {done} (sequences {(done - 1) * train.global_batch} to {done * train.global_batch - 1})"
        what = f"the loss is {result.loss} and the gradient norm {result.grad_norm}"
        if self._trainer.mesh.rank == 0:
            _logger.warning("%s is skipped: %s", where, what)
        if self._bad_steps >= train.max_bad_steps:
            self._settle(self._writer.finish())
            raise TrainingError(
                f"{self._bad_steps} steps in a row were not finite, the last {where}: {what}.",
                "lower optim.lr, or lengthen optim.warmup_steps; the newest checkpoint is intact.",
            )

    def _save_if_due(self, done: int, request: Request | None) -> None:
        every, last = self._trainer.config.checkpoint.every, done == self._trainer.config.train.last_step
        again = self._failed_saves > 0 and done - self._last_try >= max(1, every // 10)
        if not (last or request is not None or again or done % every == 0):
            return
        self._last_try = done
        # Steps that a checkpoint saves are not done again: their lines must be safe before it is visible.
        logged = self._log.flush() if self._log is not None else None
        self._settle(self._writer.begin(done, self._latest, logged))
        must_be_whole = last or request in (Request.RESTART, Request.STOP)
        if must_be_whole or self._trainer.config.checkpoint.overlap_steps == 0:
            self._settle(self._writer.finish(), must_be_whole)
        if request is not None:
            answered(request)

    def _settle(self, outcome: Outcome | None, must_be_whole: bool = False) -> None:
        """Count failures of checkpoints; all ranks count alike."""
        if outcome is None:
            return
        if outcome is Outcome.SAVED:
            self._failed_saves = 0
            return
        self._failed_saves += 1
        limit, problem = self._trainer.config.checkpoint.max_failures, self._writer.problem
        if isinstance(problem, UserError):
            raise problem
        reason = problem.problem if isinstance(problem, MoeRayError) else problem
        if must_be_whole or self._failed_saves >= limit:
            self._writer.close()
            if problem is None:
                raise TrainingError(ANOTHER_RANK, "see the error of that rank.")
            raise StorageError(
                f"{self._failed_saves} checkpoints in a row could not be written: {reason}",
                "free space or mend the storage and run the same command again; earlier checkpoints are intact.",
            )
        if problem is not None:
            _logger.warning("a checkpoint could not be written; training goes on: %s", reason)


def _train_batches(config: Config, data: TokenData, step: int, mesh: Mesh) -> list[MicroBatch]:
    train = config.train
    numbers_G = train_batch(data.num_sequences("train"), step, train.global_batch, train.seed)
    return list(micro_batches(data, "train", numbers_G, mesh.rank, mesh.world_size, train.micro_batch))
