"""How one expert lies in a file and in memory: its tensors one after another, padded to whole pages.

Shapes: e experts of a layer.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What reads that go past the page cache are multiples of, in memory and on disk.
PAGE_BYTES = 4096
# Loads of whole vectors cross no line of the cache.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Field:
    """A tensor of an expert, named as the module that stacks it over all experts names it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def num_bytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Record:
    """The weights of one expert.

    Attributes:
        num_bytes: with padding.
    """

    fields: tuple[Field, ...]
    num_bytes: int

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The tensors in `num_bytes` bytes of uint8, by name."""
        return {
            field.name: memory[field.offset : field.offset + field.num_bytes].view(field.dtype).view(field.shape)
            for field in self.fields
        }

    def fill(self, memory: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of an expert to memory, in the types of the record."""
        memory.zero_()
        for name, view in self.views(memory).items():
            view.copy_(tensors[name])


def record_of(experts: nn.Module) -> Record:
    """The record of each expert of a layer, given the module whose tensors are stacked over all of them.

    Biases are left out: they are small, and stay in memory.
    """
    fields, offset = [], 0
    for name, tensor in experts.state_dict().items():
        if name.startswith("b_"):
            continue
        fields.append(Field(name, tuple(tensor.shape[1:]), tensor.dtype, offset))
        offset += -(-fields[-1].num_bytes // _ALIGNMENT) * _ALIGNMENT
    return Record(tuple(fields), -(-offset // PAGE_BYTES) * PAGE_BYTES)
