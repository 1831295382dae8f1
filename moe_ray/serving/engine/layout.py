"""Which token of a forward pass belongs where in the paged cache.

Shapes: T tokens of the pass, S spans, B blocks of the longest sequence of the pass, R rows of the tables,
M blocks that a sequence may have, P tokens of a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
        position_T: int64, position of each token in its sequence.
        slot_T: int64, block * P + offset: where its keys and values are stored.
        first_S: int32, position of each span's first token.
        count_S: int32, tokens of each span.
        tables_SB: int32, blocks of each span's sequence in order, padded with 0, which is no sequence's block.
        num_decoding: spans of one token.
    """

    position_T: Tensor
    slot_T: Tensor
    first_S: Tensor
    count_S: Tensor
    tables_SB: Tensor
    num_decoding: int


def make_layout(spans: Sequence[Span], tables_RM: np.ndarray, block_tokens: int) -> Layout:
    """Layout of spans, those of one token first.

    Args:
        tables_RM: int32, blocks of the sequence of each row; what lies beyond its end is ignored.
        block_tokens: P.
    """
    numbers_S3 = np.array([(span.sequence.row, span.start, span.count) for span in spans], dtype=np.int64)
    row_S, first_S, count_S = numbers_S3.T
    num_decoding = int(np.count_nonzero(count_S == 1))
    assert (count_S[:num_decoding] == 1).all()
    blocks_S = -(-(first_S + count_S) // block_tokens)
    tables_SB = tables_RM[row_S, : blocks_S.max()]
    tables_SB *= np.arange(tables_SB.shape[1]) < blocks_S[:, None]
    span_T = np.repeat(np.arange(len(spans)), count_S)
    before_S = np.cumsum(count_S) - count_S
    position_T = np.arange(len(span_T)) + (first_S - before_S)[span_T]
    slot_T = tables_SB[span_T, position_T // block_tokens].astype(np.int64) * block_tokens
    slot_T += position_T % block_tokens
    narrow = (torch.from_numpy(array.astype(np.int32)) for array in (first_S, count_S, tables_SB))
    return Layout(torch.from_numpy(position_T), torch.from_numpy(slot_T), *narrow, num_decoding)
