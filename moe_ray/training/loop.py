"""The training loop of one rank: resume, step, evaluate, save, report. Knows the process group but not Ray."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from moe_ray.analytics.routing import RoutingSums
from moe_ray.checkpoint.catalog import checkpoint_path, discard_unfinished, newest_good, set_aside_later
from moe_ray.checkpoint.load import load_model, load_optimizer
from moe_ray.checkpoint.manifest import read_manifest
from moe_ray.checkpoint.save import TOKENIZER, save_checkpoint
from moe_ray.config import Config
from moe_ray.data.batches import MicroBatch, micro_batches, train_batch
from moe_ray.data.reader import TokenData, open_data
from moe_ray.errors import MoeRayError, TrainingError
from moe_ray.parallel.mesh import Mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.telemetry.run_log import append_metrics, drop_metrics_after
from moe_ray.training.held_out import held_out_batches, validation_metrics
from moe_ray.training.optimizer import build_optimizer, learning_rate
from moe_ray.training.resume import check_data, only_writer, start_sidecars
from moe_ray.training.start import start_weights
from moe_ray.training.step import StepResult, Trainer, evaluate, train_step

_logger = logging.getLogger(__name__)

Report = Callable[[dict[str, Any]], None]


def train(config: Config, mesh: Mesh, data_dir: Path, report: Report) -> None:
    """Train from the newest good checkpoint, or from the start, to `train.steps`.

    Args:
        mesh: this rank's place; every rank of it runs this function.
        data_dir: the prepared token shards.
        report: called on every rank with the metrics of each logged step.

    Raises:
        CheckpointError: all checkpoints of the run are damaged, or they are of another architecture.
        ConfigError: another job trains this run.
        StorageError: a checkpoint could not be written.
        TrainingError: the loss or a gradient is not finite.
    """
    with ExitStack() as stack:
        _train(config, mesh, data_dir, report, stack)


def _train(config: Config, mesh: Mesh, data_dir: Path, report: Report, stack: ExitStack) -> None:
    clock = PhaseClock(mesh.device, enabled=False)
    model = build_sharded_model(config.model, config.train.seed, mesh, clock, config.parallel)
    trainer = Trainer(config, mesh, model, build_optimizer(model, config.optim), clock)
    data = open_data(data_dir, config.data.sequence_length)
    interval = _Interval()
    first_step = _resume(trainer, data, stack)
    sidecars = start_sidecars(config, first_step)
    for step in range(first_step, config.train.steps):
        started = time.perf_counter()
        done = step + 1
        evaluates = done == config.train.steps or done % config.train.eval_every == 0
        clock.enabled = evaluates or done % config.train.log_every == 0
        # The generator's state is a function of seed, step and rank, so checkpoints need not hold it.
        torch.manual_seed(((config.train.seed * 1_000_003 + step) * 65_537 + mesh.rank) % 2**63)
        with clock.phase("data"):
            batches = _train_batches(config, data, step, mesh)
        lr = learning_rate(step, config.train.steps, config.optim)
        try:
            result = train_step(trainer, batches, lr)
        except TrainingError as error:
            raise TrainingError(f"step {done}: {error.problem}", error.fix) from None
        interval.add(result, time.perf_counter() - started)
        if clock.enabled:
            metrics = _metrics(trainer, done, lr, result, interval)
            if evaluates:
                metrics |= _evaluation(trainer, data)
            if mesh.rank == 0:
                append_metrics(config.train.run_dir, metrics)
            report(metrics)
            interval = _Interval()
        if done == config.train.steps or done % config.checkpoint.every == 0:
            _save(trainer, data, sidecars, done)


def _resume(trainer: Trainer, data: TokenData, stack: ExitStack) -> int:
    """Load the newest good checkpoint, or what the run starts from; returns the number of finished steps.

    Rank 0 holds the run until `stack` is closed.
    """
    run_dir, mesh = trainer.config.train.run_dir, trainer.mesh
    step, problem = 0, None
    if mesh.rank == 0:
        try:
            stack.enter_context(only_writer(run_dir))
            discard_unfinished(run_dir)
            found = newest_good(run_dir)
            step = found[1].step if found else 0
            set_aside_later(run_dir, step)
            drop_metrics_after(run_dir, step)
        except (MoeRayError, OSError) as error:
            step, problem = -1, error
    shared = torch.tensor(step, device=mesh.device)
    if mesh.world_size > 1:
        dist.broadcast(shared, src=0)
    step = int(shared)
    if problem is not None:
        raise problem
    if step < 0:
        raise TrainingError("rank 0 could not resume the run.", "see the error of rank 0.")
    if step > 0:
        path = checkpoint_path(run_dir, step)
        manifest = read_manifest(path)
        check_data(manifest, data.index)
        load_model(path, manifest, trainer.model)
        load_optimizer(path, manifest, trainer.model, trainer.optimizer)
        _logger.info("resumed from %s", path)
    else:
        start_weights(trainer)
    return step


def _save(trainer: Trainer, data: TokenData, sidecars: Mapping[str, bytes], done: int) -> None:
    save_checkpoint(
        trainer.config,
        trainer.mesh,
        trainer.model,
        trainer.optimizer,
        data.folder / TOKENIZER,
        step=done,
        data_digest=data.index.digest,
        sidecars=sidecars,
    )


@dataclass
class _Interval:
    """The steps since the last logged one."""

    steps: int = 0
    seconds: float = 0.0
    routing: RoutingSums | None = None

    def add(self, result: StepResult, seconds: float) -> None:
        self.steps += 1
        self.seconds += seconds
        self.routing = result.routing if self.routing is None else self.routing + result.routing


def _metrics(trainer: Trainer, done: int, lr: float, result: StepResult, interval: _Interval) -> dict[str, Any]:
    """Loss, norm and phases are of the step, speed and routing of the interval: small batches route noisily."""
    phases = trainer.clock.take()
    step_seconds = interval.seconds / interval.steps
    assert interval.routing is not None
    return {
        "step": done,
        "tokens": done * result.num_tokens,
        "loss": result.loss,
        "perplexity": math.exp(min(result.loss, 700.0)),
        "grad_norm": result.grad_norm,
        "lr": lr,
        "tokens_per_second": result.num_tokens / step_seconds,
        "step_seconds": step_seconds,
        **{f"{phase}_seconds": seconds for phase, seconds in phases.items()},
        **interval.routing.metrics(result.num_tokens * interval.steps),
        "memory_bytes": _memory_bytes(trainer.mesh.device),
        "world_size": trainer.mesh.world_size,
        "ep": trainer.mesh.ep,
        "time": time.time(),
    }


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of the GPU since the start, or resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


def _train_batches(config: Config, data: TokenData, step: int, mesh: Mesh) -> list[MicroBatch]:
    train = config.train
    numbers_G = train_batch(data.num_sequences("train"), step, train.global_batch, train.seed)
    return list(micro_batches(data, "train", numbers_G, mesh.rank, mesh.world_size, train.micro_batch))


def _evaluation(trainer: Trainer, data: TokenData) -> dict[str, Any]:
    train, mesh = trainer.config.train, trainer.mesh
    batches = held_out_batches(data, mesh, train.global_batch, train.eval_batches, train.micro_batch)
    return validation_metrics(evaluate(trainer.model, mesh, train.dtype, batches, len(data.domains)), data.domains)
