"""The memory of keys and values, in blocks of a few tokens that sequences take, share and give back.

Shapes: X blocks, h key/value heads, P tokens of a block, C query and key head dim, U value head dim.
"""

from collections.abc import Sequence

import numpy as np
import psutil
import torch
from torch import Tensor

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError

# Small blocks are shared more often and waste less at the end of a text; kernels want a multiple of 16.
BLOCK_TOKENS = 16
# Of the memory that is free at the start; the rest is for what a forward pass needs, and for neighbours.
FREE_SHARE = 0.5


class KVCache:
    """Preallocated keys and values of `num_blocks` blocks in every layer.

    Attributes:
        layers: of each layer the keys [X, h, P, C] and the values [X, h, P, U], contiguous. Block 0 pads tables,
            no sequence writes to it and it stays zero.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks, config.num_kv_heads, block_tokens)
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        # Zeros need no memory before they are written to.
        self.layers: list[tuple[Tensor, Tensor]] = [
            (
                torch.zeros(*shape, config.qk_dim, dtype=dtype, device=device),
                torch.zeros(*shape, config.v_dim, dtype=dtype, device=device),
            )
            for _ in range(config.num_layers)
        ]

    def read(self, blocks: Sequence[int]) -> np.ndarray:
        """Copy of what blocks hold, uint8 of shape [blocks, bytes of a block]."""
        index = torch.tensor(blocks, device=self.layers[0][0].device)
        parts = [stored[index].flatten(1).view(torch.uint8) for pair in self.layers for stored in pair]
        return torch.cat(parts, dim=1).cpu().numpy()

    def write(self, blocks: Sequence[int], data: np.ndarray) -> None:
        """Store what `read` gave."""
        stored = [tensor for pair in self.layers for tensor in pair]
        index = torch.tensor(blocks, device=stored[0].device)
        sizes = [tensor[0].nbytes for tensor in stored]
        for tensor, part in zip(stored, torch.from_numpy(data).split(sizes, dim=1), strict=True):
            tensor[index] = part.contiguous().view(tensor.dtype).view(-1, *tensor.shape[1:]).to(tensor.device)


def blocks_of(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK_TOKENS)


def bytes_per_block(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a block in all layers."""
    width = config.num_layers * config.num_kv_heads * (config.qk_dim + config.v_dim)
    return BLOCK_TOKENS * width * dtype.itemsize


def count_blocks(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    wanted: int,
    budget_bytes: int | None,
    free_share: float,
) -> int:
    """Blocks that a cache should have, the one that pads tables included.

    Args:
        wanted: blocks for sequences if memory allows.
        budget_bytes: of the whole cache, whatever is wanted. None: as wanted, but at most `free_share` of the
            memory of the device that is free now.

    Raises:
        ConfigError: the budget holds no sequence.
    """
    size = bytes_per_block(config, dtype)
    if budget_bytes is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return max(2, min(wanted + 1, int(free_share * free) // size))
    if budget_bytes < 2 * size:
        raise ConfigError(
            f"serve.kv_cache_bytes={budget_bytes} holds no text: {BLOCK_TOKENS} tokens of this model take {size}.",
            f"use at least {2 * size}.",
        )
    return budget_bytes // size
