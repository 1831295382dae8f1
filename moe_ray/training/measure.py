"""What the training loop reports of its steps."""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from moe_ray.analytics.routing import RoutingSums, load_cv
from moe_ray.config import ModelConfig
from moe_ray.data.batches import MicroBatch
from moe_ray.training.step import StepResult, Trainer

_BITS = 40
_SMOOTHING = 0.1
_TREND_STEPS = 10


@dataclass
class Interval:
    """The steps since the last logged one."""

    steps: int = 0
    skipped: int = 0
    seconds: float = 0.0
    routing: RoutingSums | None = None

    def add(self, result: StepResult, seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.skipped += not result.is_finite
        self.seconds += seconds
        if result.is_finite:
            self.routing = result.routing if self.routing is None else self.routing + result.routing


class LossTrend:
    """The loss beside the best that it has been, both smoothed over the last ten logged steps or so.

    Args:
        losses: those logged before; None for steps that were skipped.
    """

    def __init__(self, losses: Iterable[float | None] = ()) -> None:
        self._smooth = self._best = math.inf
        for loss in losses:
            self.add(loss)

    def add(self, loss: float | None) -> float | None:
        """Smoothed loss over the lowest that it has been, 1 while it falls; None before the first loss."""
        if loss is not None:
            known = math.isfinite(self._smooth)
            self._smooth = _SMOOTHING * loss + (1 - _SMOOTHING) * self._smooth if known else loss
            self._best = min(self._best, self._smooth)
        return self._smooth / self._best if 0 < self._best < math.inf else None


class LoadTrend:
    """How far the load of experts is from balance, over the last ten steps or so: a small batch says little.

    Shapes: L MoE layers, E experts.
    """

    def __init__(self, model: ModelConfig) -> None:
        # The coefficient of variation when all tokens choose the same top_k experts.
        self._largest_cv = math.sqrt(max(0.0, model.num_experts / model.top_k - 1))
        self._loads_LE: Tensor | None = None
        self._steps = 0

    def add(self, loads_by_layer: Sequence[Sequence[float]], steps: int) -> list[float]:
        """Add the mean load of some steps; returns the imbalance by layer over the largest one, from 0 to 1."""
        loads_LE = torch.tensor(loads_by_layer, dtype=torch.float64)
        self._steps += steps
        weight = max(min(1.0, steps / _TREND_STEPS), steps / self._steps)
        before_LE = loads_LE if self._loads_LE is None else self._loads_LE
        self._loads_LE = torch.lerp(before_LE, loads_LE, weight)
        cv_L = load_cv(self._loads_LE)
        return (cv_L / self._largest_cv).tolist() if self._largest_cv else [0.0] * len(cv_L)


def step_metrics(trainer: Trainer, done: int, lr: float, result: StepResult, interval: Interval) -> dict[str, Any]:
    """Loss, norm and phases are of the step, speed and routing of the interval: small batches route noisily.

    Loss and norm of a skipped step are None.
    """
    phases = trainer.clock.take()
    step_seconds = interval.seconds / interval.steps
    routing, finite_steps = interval.routing or result.routing, max(1, interval.steps - interval.skipped)
    is_finite = result.is_finite
    return {
        "step": done,
        "tokens": done * result.num_tokens,
        "loss": result.loss if is_finite else None,
        "perplexity": math.exp(min(result.loss, 700.0)) if is_finite else None,
        "grad_norm": result.grad_norm if is_finite else None,
        "lr": lr,
        "skipped_steps": interval.skipped,
        "tokens_per_second": result.num_tokens / step_seconds,
        "step_seconds": step_seconds,
        **{f"{phase}_seconds": seconds for phase, seconds in phases.items()},
        **routing.metrics(result.num_tokens * finite_steps),
        "memory_bytes": _memory_bytes(trainer.mesh.device),
        "world_size": trainer.mesh.world_size,
        "ep": trainer.mesh.ep,
        "time": time.time(),
    }


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Those of the metrics that are one finite number."""
    return {
        name: value for name, value in metrics.items() if isinstance(value, int | float) and math.isfinite(value)
    }


def sample_checksum(batches: Sequence[MicroBatch]) -> float:
    """A number that tells which sequences a rank was given, in any order.

    Its sum over the ranks, modulo 2**40, is equal for equal global batches whatever the world: proof that none was
    left out or came twice.
    """
    total = 0
    for batch in batches:
        weights_S = torch.arange(1, batch.tokens_BS.shape[1] + 1).pow(3)
        of_each_B = (batch.tokens_BS * weights_S).sum(dim=1)
        total += int((of_each_B * 0x9E3779B1 % 2**_BITS).sum())
    return float(total % 2**_BITS)


def wrap_checksum(total: float) -> int:
    """The sum of the ranks' checksums as it is logged."""
    return int(total) % 2**_BITS


def _memory_bytes(device: torch.device) -> int:
    """Peak memory of the GPU since the start, or resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss
