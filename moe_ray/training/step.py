"""One optimizer step over a global batch, and one evaluation; the same on every world size.

Shapes: B sequences, S tokens of each, T tokens (B*S), D model dim, E experts, L MoE layers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ray.analytics.routing import RoutingSums
from moe_ray.config import Config, ModelConfig
from moe_ray.models.losses import load_balancing_loss, next_token_loss, router_z_loss
from moe_ray.models.router import Routing
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.grads import clip_gradients, reduce_gradients
from moe_ray.parallel.mesh import Mesh
from moe_ray.telemetry.clock import PhaseClock


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
    """

    loss: float
    grad_norm: float
    routing: RoutingSums
    num_tokens: int


def train_step(trainer: Trainer, micro_batches: Iterable[tuple[Tensor, Tensor]], lr: float) -> StepResult:
    """Accumulate gradients over this rank's micro-batches, reduce, clip and update.

    Args:
        micro_batches: pairs of int64 `tokens_BS, targets_BS`; equally many on every rank, of which some may
            hold no sequences. Together, over ranks, they are the global batch.
        lr: learning rate of this update.
    """
    config, clock = trainer.config, trainer.clock
    num_tokens = config.train.global_batch * config.data.sequence_length
    loss_sum = torch.zeros((), dtype=torch.float64, device=trainer.mesh.device)
    routing = _no_routing(trainer)
    for tokens_BS, targets_BS in micro_batches:
        with clock.phase("forward"):
            loss, routings = _forward(trainer, tokens_BS, targets_BS, num_tokens)
            total = loss + auxiliary_losses(trainer.model, routings, num_tokens, config.model)
            routing.add(routings)
            loss_sum += loss.detach().double()
        with clock.phase("backward"):
            total.backward()
    with clock.phase("reduce"):
        reduce_gradients(trainer.model, trainer.mesh)
        grad_norm = clip_gradients(trainer.model, trainer.mesh, config.optim.clip_norm)
        _sum_over_world(trainer.mesh, loss_sum, routing)
    with clock.phase("optimizer"):
        for group in trainer.optimizer.param_groups:
            group["lr"] = lr
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        for moe, load_fraction_E in zip(trainer.model.moe_modules(), routing.load_fraction_LE, strict=True):
            moe.router.load_fraction_E.copy_(load_fraction_E)
    return StepResult(loss_sum.item(), grad_norm.item(), routing, num_tokens)


def auxiliary_losses(
    model: Transformer, routings: Iterable[Routing], num_tokens: int, config: ModelConfig
) -> Tensor | float:
    """Weighted load-balancing and z-losses, summed over layers (as Megatron-Core does).

    The load in the balancing loss is that of the previous global batch: it is known before the forward pass,
    so the loss is the same function of the parameters for any world size and any number of micro-batches.
    """
    total: Tensor | float = 0.0
    for moe, routing in zip(model.moe_modules(), routings, strict=True):
        balance = load_balancing_loss(routing.probs_TE, moe.router.load_fraction_E, num_tokens)
        total = total + config.load_balancing_loss_weight * balance
        total = total + config.router_z_loss_weight * router_z_loss(routing.logits_TE, num_tokens)
    return total


@torch.no_grad()
def evaluate(trainer: Trainer, micro_batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Mean next-token cross-entropy in nats over micro-batches of all ranks; equally many on each."""
    trainer.model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=trainer.mesh.device)
    for tokens_BS, targets_BS in micro_batches:
        loss, _ = _forward(trainer, tokens_BS, targets_BS, 1)
        sums += torch.stack((loss.double(), torch.tensor(float(targets_BS.numel()), device=sums.device).double()))
    trainer.model.train()
    trainer.mesh.sum_over_world(sums)
    return (sums[0] / sums[1]).item()


def _forward(
    trainer: Trainer, tokens_BS: Tensor, targets_BS: Tensor, num_tokens: int
) -> tuple[Tensor, tuple[Routing, ...]]:
    device = trainer.mesh.device
    dtype = getattr(torch, trainer.config.train.dtype)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        output = trainer.model(tokens_BS.to(device, non_blocking=True))
        logits_TV = trainer.model.logits(output.hidden_BSD.flatten(0, 1))
    return next_token_loss(logits_TV, targets_BS.to(device).flatten(), num_tokens), output.routings


def _no_routing(trainer: Trainer) -> RoutingSums:
    config = trainer.config.model
    return RoutingSums.zeros(len(config.moe_layers), config.num_experts, trainer.mesh.device)


def _sum_over_world(mesh: Mesh, loss_sum: Tensor, routing: RoutingSums) -> None:
    """One message for both."""
    flat = torch.cat((loss_sum.unsqueeze(0), routing.sums_LX.flatten()))
    mesh.sum_over_world(flat)
    loss_sum.copy_(flat[0])
    routing.sums_LX.copy_(flat[1:].view_as(routing.sums_LX))
