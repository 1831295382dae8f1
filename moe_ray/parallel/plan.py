"""Which mesh the world at hand gets: as much expert parallelism as the settings allow, more if memory asks for it.

The memory of a rank is that of parameters, gradients and AdamW's two moments in float32: 16 bytes a parameter,
divided as the settings say. Left out are activations, which `train.micro_batch` decides, the weights of the block
that FSDP2 has gathered, the buffers of collectives, what a checkpoint copies, and what torch itself takes.
"""

import logging
import math
from dataclasses import dataclass

import psutil
import torch

from moe_ray.config import Config
from moe_ray.model_config import ModelConfig, divisors

_logger = logging.getLogger(__name__)

_FLOAT32_BYTES = 4
# The parameter, its gradient, and AdamW's first and second moment.
_TENSORS_PER_PARAMETER = 4
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """The mesh of a world and what each rank of it holds.

    Attributes:
        world_size: ranks.
        ep: ranks that share one set of experts.
        dense_bytes: float32 parameters of a rank that are no experts.
        expert_bytes: float32 parameters of the experts of a rank; of the fullest one where they are cut unevenly.
        fits: whether the training state fits into the memory of a worker, so far as that is known.
    """

    world_size: int
    ep: int
    dense_bytes: int
    expert_bytes: int
    fits: bool

    @property
    def dp(self) -> int:
        """Copies of each expert, or ranks that it is sharded over."""
        return self.world_size // self.ep

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients and AdamW's moments of a rank."""
        return _TENSORS_PER_PARAMETER * (self.dense_bytes + self.expert_bytes)


def plan_mesh(config: Config, world_size: int, memory_bytes: int | None) -> Plan:
    """The largest `ep` that `parallel.ep` allows; a larger one if only that fits; never an error.

    Args:
        config: its `model` has the final architecture.
        world_size: ranks that train, at least 1.
        memory_bytes: memory of a worker; None if unknown, and then everything fits.

    Returns:
        The plan, with an `ep` that divides `world_size` and the number of experts. If none fits, the one that
        shares the experts most, and a warning is logged.
    """
    plan = _plan(config, world_size, memory_bytes)
    if not plan.fits and memory_bytes is not None:
        _logger.warning(
            "%s: more than the %.1f MiB of a worker; training may run out of memory. Fix: set "
            "parallel.shard_dense and parallel.shard_experts, or train with more workers.",
            describe(plan),
            memory_bytes / _MIB,
        )
    return plan


def best_world(config: Config, available: int, memory_bytes: int | None) -> int:
    """The largest world from `parallel.workers`' minimum to `available` ranks that fits; `available` if none does.

    More ranks need not fit better: 5 share 8 experts worse than 4 do.
    """
    for world_size in range(available, config.parallel.min_workers - 1, -1):
        if _plan(config, world_size, memory_bytes).fits:
            return world_size
    return available


def describe(plan: Plan) -> str:
    """One line for the log."""
    dense, experts, state = (n / _MIB for n in (plan.dense_bytes, plan.expert_bytes, plan.state_bytes))
    return (
        f"world {plan.world_size} = dp {plan.dp} x ep {plan.ep}; per rank {dense:.1f} MiB dense + "
        f"{experts:.1f} MiB experts, {state:.1f} MiB with gradients and AdamW"
    )


def worker_memory(device: torch.device, local_world: int) -> int | None:
    """Bytes of a worker: its whole GPU, or its share of the node among `local_world` ranks; None: unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu":
        return psutil.virtual_memory().total // local_world
    return None


def _plan(config: Config, world_size: int, memory_bytes: int | None) -> Plan:
    limit = world_size if config.parallel.ep == "auto" else config.parallel.ep
    divide = divisors(math.gcd(world_size, config.model.num_experts))
    allowed = max(ep for ep in divide if ep <= limit)
    plans = [_with_ep(config, world_size, ep, memory_bytes) for ep in divide if ep >= allowed]
    return next((plan for plan in plans if plan.fits), plans[-1])


def _with_ep(config: Config, world_size: int, ep: int, memory_bytes: int | None) -> Plan:
    model, parallel = config.model, config.parallel
    experts = model.num_expert_params()
    dense_bytes = _FLOAT32_BYTES * (model.num_params() - experts)
    if parallel.shard_dense:
        dense_bytes = math.ceil(dense_bytes / world_size)
    expert_bytes = _FLOAT32_BYTES * experts // ep
    if parallel.shard_experts:
        expert_bytes = _largest_part(expert_bytes, model, ep, parts=world_size // ep)
    state_bytes = _TENSORS_PER_PARAMETER * (dense_bytes + expert_bytes)
    fits = memory_bytes is None or state_bytes <= memory_bytes
    return Plan(world_size, ep, dense_bytes, expert_bytes, fits)


def _largest_part(expert_bytes: int, model: ModelConfig, ep: int, parts: int) -> int:
    """FSDP2 cuts an expert matrix evenly along a dim that `parts` divides; without one, between whole experts."""
    local_experts = model.num_experts // ep
    if any(size % parts == 0 for size in (local_experts, model.dim, model.expert_dim)):
        return expert_bytes // parts
    return expert_bytes // local_experts * math.ceil(local_experts / parts)
