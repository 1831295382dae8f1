"""What to say when memory runs out in a training step: where, on how much, how unbalanced, and what to change.

Shapes: L MoE layers, E experts.
"""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from moe_ray.analytics.routing import RoutingSums
from moe_ray.config import Config
from moe_ray.errors import OutOfMemoryError
from moe_ray.models.transformer import Transformer
from moe_ray.parallel.mesh import Mesh

# What the allocators of torch, oneDNN and C++ say in a RuntimeError that has no type of its own.
_ALLOCATORS = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory",
    "could not create a memory object",
    "std::bad_alloc",
    "CUDA out of memory",
)


@contextmanager
def explain_out_of_memory(
    config: Config, mesh: Mesh, model: Transformer, phase: str, shape: tuple[int, ...], routing: RoutingSums
) -> Generator[None]:
    """Turn a failed allocation inside the `with` block into the error that says what to do about it.

    Args:
        phase: of the step, such as `forward`.
        shape: sequences and tokens of each in a micro-batch of this rank.
        routing: what this rank has routed in this step so far.

    Raises:
        OutOfMemoryError: `torch.OutOfMemoryError`, `MemoryError` or an allocator's RuntimeError was raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        expert, rank = _imbalance(_load_fraction(model, routing), mesh.ep)
        sequences, length = shape
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise OutOfMemoryError(
            f"worker {mesh.rank} ran out of memory in phase {phase} with micro-batches of {sequences} sequences x "
            f"{length} tokens; the busiest expert takes {expert:.2f} times the mean of tokens, the busiest rank "
            f"of an ep group {rank:.2f} times ({reason}).",
            _advice(config, mesh),
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _ALLOCATORS)


def _load_fraction(model: Transformer, routing: RoutingSums) -> Tensor:
    """`load_fraction_LE` of this step, or of the one before as long as nothing was routed in this one."""
    if routing.tokens_per_expert_LE.any():
        return routing.load_fraction_LE
    return torch.stack([moe.router.load_fraction_E for moe in model.moe_modules()])


def _imbalance(load_fraction_LE: Tensor, ep: int) -> tuple[float, float]:
    """Largest expert's and largest rank's share over the mean one, in the worst layer."""
    layers, experts = load_fraction_LE.shape
    by_rank = load_fraction_LE.view(layers, ep, experts // ep).sum(dim=2)
    return load_fraction_LE.max().item() * experts, by_rank.max().item() * ep


def _advice(config: Config, mesh: Mesh) -> str:
    """The settings that can still be changed, in the order in which they cost least."""
    parallel, micro_batch, length = config.parallel, config.train.micro_batch, config.data.sequence_length
    steps = []
    if micro_batch > 1:
        steps.append(f"lower train.micro_batch (now {micro_batch})")
    if mesh.ep > 1:
        steps.append(f"lower parallel.dispatch_buffer_factor (now {parallel.dispatch_buffer_factor:g})")
    steps.append(f"raise parallel.ep (now {mesh.ep} of {mesh.world_size} workers)")
    steps += [f"set parallel.{name}" for name in ("shard_dense", "shard_experts") if not getattr(parallel, name)]
    steps.append(f"lower data.sequence_length (now {length})")
    return "in this order, " + ", ".join(steps) + "; the same command goes on from the newest checkpoint."
