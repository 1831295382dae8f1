"""Which token of a forward pass belongs where in the paged cache.

Shapes: T tokens of the pass, S spans, B blocks of the longest sequence of the pass, R rows of the tables,
M blocks that a sequence may have, P tokens of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor

from moe_ray.serving.engine.scheduler import Span


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one forward pass belong, shared by all layers; on the CPU.

    There is one row of T tokens, those of S spans one after another; a span is consecutive tokens of one
    sequence, and spans of one token come first.

    Attributes:
        spans_S3: int64, of each span the row of its sequence, the position of its first token, its tokens.
        tables_RM: int32, blocks of the sequence of each row in order; what lies beyond its end is ignored. It is
            the scheduler's own, so a layout is good until that plans again.
        block_tokens: P.
    """

    spans_S3: np.ndarray
    tables_RM: np.ndarray
    block_tokens: int

    @classmethod
    def of(cls, spans: Sequence[Span], tables_RM: np.ndarray, block_tokens: int) -> Self:
        """That of spans, those of one token first."""
        numbers = [(span.sequence.row, span.start, span.count) for span in spans]
        return cls(np.array(numbers, dtype=np.int64), tables_RM, block_tokens)

    @cached_property
    def num_decoding(self) -> int:
        """Spans of one token."""
        count_S = self.spans_S3[:, 2]
        number = int(np.count_nonzero(count_S == 1))
        assert (count_S[:number] == 1).all()
        return number

    @cached_property
    def tables_SB(self) -> Tensor:
        """int64, blocks of each span's sequence in order, padded with 0, which is no sequence's block."""
        row_S, first_S, count_S = self.spans_S3.T
        blocks_S = -(-(first_S + count_S) // self.block_tokens)
        tables_SB = self.tables_RM[row_S, : blocks_S.max()].astype(np.int64)
        tables_SB *= np.arange(tables_SB.shape[1]) < blocks_S[:, None]
        return torch.from_numpy(tables_SB)

    @cached_property
    def position_T(self) -> Tensor:
        """int64, position of each token in its sequence."""
        _, first_S, count_S = self.spans_S3.T
        before_S = np.cumsum(count_S) - count_S
        return torch.from_numpy(np.arange(count_S.sum()) + np.repeat(first_S - before_S, count_S))

    @cached_property
    def block_T(self) -> Tensor:
        """int64, the block in which each token's keys and values are stored."""
        row_T = np.repeat(self.spans_S3[:, 0], self.spans_S3[:, 2])
        block_T = self.tables_RM[row_T, self.position_T.numpy() // self.block_tokens]
        return torch.from_numpy(block_T.astype(np.int64))
