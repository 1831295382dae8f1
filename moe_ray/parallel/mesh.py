"""The two axes of the world: `dp` (copies of the experts) by `ep` (ranks that share one set of experts).

Every rank has its own part of the batch. Dense parameters are replicated over the whole world, expert
parameters over `dp` only. Rank = dp_rank * ep + ep_rank, so that an `ep` group sits on neighbouring ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from moe_ray.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the world. The groups are None where the axis has size 1."""

    rank: int
    world_size: int
    ep: int
    device: torch.device
    ep_group: dist.ProcessGroup | None = None
    dp_group: dist.ProcessGroup | None = None

    @property
    def dp(self) -> int:
        """Copies of each expert."""
        return self.world_size // self.ep

    @property
    def ep_rank(self) -> int:
        """Which share of the experts this rank holds."""
        return self.rank % self.ep

    @property
    def dp_rank(self) -> int:
        """Which copy of the experts this rank holds."""
        return self.rank // self.ep

    def sum_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks in place and return it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def build_mesh(ep: int, device: torch.device | str = "cpu") -> Mesh:
    """Lay the mesh over the initialised default process group; without one the world is this process.

    Raises:
        ConfigError: `ep` does not divide the world size.
    """
    device = torch.device(device)
    if not dist.is_initialized():
        rank, world_size = 0, 1
    else:
        rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % ep:
        raise ConfigError(
            f"parallel.ep={ep} does not divide the world of {world_size} ranks.", "choose a divisor of it."
        )
    if world_size == 1:
        return Mesh(rank, world_size, ep, device)
    axes = init_device_mesh(device.type, (world_size // ep, ep), mesh_dim_names=("dp", "ep"))
    return Mesh(
        rank,
        world_size,
        ep,
        device,
        ep_group=axes.get_group("ep") if ep > 1 else None,
        dp_group=axes.get_group("dp") if ep < world_size else None,
    )
