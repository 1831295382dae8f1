"""One optimizer step over a global batch, and one evaluation; the same on every world size.

Shapes: B sequences, S tokens of each, T tokens (B*S), E experts, L MoE layers, V vocabulary, M domains.
"""

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ray.analytics.routing import RoutingSums
from moe_ray.config import Config
from moe_ray.data.batches import MicroBatch
from moe_ray.models.losses import (
    load_balancing_loss,
    next_token_loss,
    router_z_loss,
    sequence_load_balancing_loss,
)
from moe_ray.models.router import Routing
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.fsdp import predict
from moe_ray.parallel.grads import clip_gradients, reduce_gradients
from moe_ray.parallel.mesh import Mesh
from moe_ray.section import Dtype
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.memory import explain_out_of_memory


@dataclass(frozen=True)
class Trainer:
    """What a step works on."""

    config: Config
    mesh: Mesh
    model: Transformer
    optimizer: torch.optim.Optimizer
    clock: PhaseClock


@dataclass(frozen=True)
class StepResult:
    """Statistics of the global batch, equal on all ranks.

    Attributes:
        loss: mean next-token cross-entropy in nats, without auxiliary losses.
        grad_norm: global gradient norm before clipping.
        routing: sums over the global batch.
        num_tokens: tokens of the global batch.
        signals: the numbers that the ranks gave, summed over them.
    """

    loss: float
    grad_norm: float
    routing: RoutingSums
    num_tokens: int
    signals: tuple[float, ...]

    @property
    def is_finite(self) -> bool:
        """Whether the step was applied: loss and gradients were finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    trainer: Trainer,
    micro_batches: Iterable[MicroBatch],
    lr: float,
    signals: Sequence[float] = (),
    before_update: Callable[[Sequence[float]], None] = lambda sums: None,
) -> StepResult:
    """Accumulate gradients over this rank's micro-batches, reduce, clip and update.

    Args:
        micro_batches: equally many on every rank, of which some may hold no sequences. Together, over ranks,
            they are the global batch.
        lr: learning rate of this update.
        signals: numbers to be summed over the ranks along with the loss, equally many on every rank.
        before_update: called with the sums of the signals when only the update is left to do.

    If the loss or a gradient is not finite, parameters, optimizer and routers stay as they were, on all ranks.

    Raises:
        OutOfMemoryError: memory ran out; after the phase `optimizer` has begun, the parameters are undefined.
    """
    mesh, train = trainer.mesh, trainer.config.train
    shape = (train.micro_batch, trainer.config.data.sequence_length)
    loss_sum, routing = accumulate_gradients(trainer, micro_batches)
    with _phase(trainer, "reduce", shape, routing):
        reduce_gradients(trainer.model, mesh)
        grad_norm = clip_gradients(trainer.model, mesh, trainer.config.optim.clip_norm)
        loss, sums = _sum_over_world(mesh, loss_sum, routing, signals)
    before_update(sums)
    result = StepResult(loss, grad_norm.item(), routing, _tokens_per_step(trainer.config), sums)
    if not result.is_finite:
        trainer.optimizer.zero_grad()
        return result
    with _phase(trainer, "optimizer", shape, routing):
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        for moe, load_fraction_E in zip(trainer.model.moe_modules(), routing.load_fraction_LE, strict=True):
            moe.router.load_fraction_E.copy_(load_fraction_E)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    return result


def accumulate_gradients(trainer: Trainer, micro_batches: Iterable[MicroBatch]) -> tuple[Tensor, RoutingSums]:
    """Forward and backward over this rank's micro-batches.

    Returns:
        This rank's part of the mean loss (float64 scalar) and of the routing sums.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    config = trainer.config
    num_tokens = _tokens_per_step(config)
    loss_sum = torch.zeros((), dtype=torch.float64, device=trainer.mesh.device)
    routing = RoutingSums.zeros(len(config.model.moe_layers), config.model.num_experts, trainer.mesh.device)
    for batch in micro_batches:
        shape = tuple(batch.tokens_BS.shape)
        with _phase(trainer, "forward", shape, routing):
            logits_TV, routings = _forward(trainer.model, trainer.mesh, config.train.dtype, batch)
            loss = next_token_loss(logits_TV, batch.targets_BS.to(trainer.mesh.device).flatten(), num_tokens)
            total = loss + auxiliary_losses(trainer.model, routings, len(batch.tokens_BS), num_tokens)
            routing.add(routings)
            loss_sum += loss.detach().double()
        with _phase(trainer, "backward", shape, routing):
            total.backward()
    return loss_sum, routing


@contextmanager
def _phase(trainer: Trainer, name: str, shape: tuple[int, ...], routing: RoutingSums) -> Generator[None]:
    """Time a phase and explain where memory runs out in it."""
    explained = explain_out_of_memory(trainer.config, trainer.mesh, trainer.model, name, shape, routing)
    with explained, trainer.clock.phase(name):
        yield


def auxiliary_losses(
    model: Transformer, routings: Iterable[Routing], num_sequences: int, num_tokens: int
) -> Tensor | float:
    """Weighted load-balancing and z-losses of a micro-batch, summed over layers (as Megatron-Core does).

    The load in the balancing loss is by default that of the previous global batch: it is known before the
    forward pass, so the loss is the same function of the parameters for any world size and any number of
    micro-batches; that of each sequence is so too. That of the micro-batch (Fedus et al. 2021) depends on both.

    Args:
        num_sequences: sequences of the micro-batch.
        num_tokens: tokens of the global batch.
    """
    config = model.config
    total: Tensor | float = 0.0
    for moe, routing in zip(model.moe_modules(), routings, strict=True):
        probs_TE = routing.probs_TE
        if not config.load_balancing_loss_weight:
            balance: Tensor | float = 0.0
        elif config.load_balancing_scope == "sequence":
            balance = sequence_load_balancing_loss(probs_TE, routing.expert_ids_TK, num_sequences, num_tokens)
        elif config.load_balancing_scope == "micro_batch":
            load_E = routing.load().float()
            balance = load_balancing_loss(probs_TE, load_E / load_E.sum().clamp(min=1), num_tokens)
        else:
            balance = load_balancing_loss(probs_TE, moe.router.load_fraction_E, num_tokens)
        total = total + config.load_balancing_loss_weight * balance
        if config.router_z_loss_weight and routing.logits_TE is not None:
            total = total + config.router_z_loss_weight * router_z_loss(routing.logits_TE, num_tokens)
    return total


@torch.no_grad()
def evaluate(
    model: Transformer, mesh: Mesh, dtype: Dtype, micro_batches: Iterable[MicroBatch], num_domains: int
) -> Tensor:
    """Cross-entropy of held-out sequences, by domain.

    Args:
        micro_batches: this rank's share; equally many on every rank.
        num_domains: domain ids are below it (M).

    Returns:
        `sums_2M`, float64, equal on all ranks: summed cross-entropy in nats, and the number of tokens.
    """
    model.eval()
    sums_2M = torch.zeros(2, num_domains, dtype=torch.float64, device=mesh.device)
    for batch in micro_batches:
        logits_TV, _ = _forward(model, mesh, dtype, batch)
        targets_BS = batch.targets_BS.to(mesh.device)
        losses_T = F.cross_entropy(logits_TV.float(), targets_BS.flatten(), reduction="none")
        domains_T = batch.domains_B.to(mesh.device).repeat_interleave(targets_BS.shape[1])
        sums_2M[0].index_add_(0, domains_T, losses_T.double())
        sums_2M[1].index_add_(0, domains_T, torch.ones_like(losses_T, dtype=torch.float64))
    model.train()
    return mesh.sum_over_world(sums_2M)


def _forward(
    model: Transformer, mesh: Mesh, dtype: Dtype, batch: MicroBatch
) -> tuple[Tensor, tuple[Routing, ...]]:
    """Logits_TV and the routings of a micro-batch, computed in `dtype`."""
    with torch.autocast(mesh.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        return predict(model, batch.tokens_BS.to(mesh.device, non_blocking=True))


def _tokens_per_step(config: Config) -> int:
    return config.train.global_batch * config.data.sequence_length


def _sum_over_world(
    mesh: Mesh, loss_sum: Tensor, routing: RoutingSums, signals: Sequence[float]
) -> tuple[float, tuple[float, ...]]:
    """Sum the routing in place and return the sums of losses and signals, all in one message."""
    scalars = torch.tensor(signals, dtype=torch.float64).to(mesh.device)
    flat = mesh.sum_over_world(torch.cat((loss_sum.unsqueeze(0), scalars, routing.sums_LX.flatten())))
    loss, *sums = flat[: 1 + len(signals)].tolist()
    routing.sums_LX.copy_(flat[1 + len(signals) :].view_as(routing.sums_LX))
    return loss, tuple(sums)
