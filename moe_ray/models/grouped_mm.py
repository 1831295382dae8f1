"""Grouped matrix multiplication that also works under torch.compile on a CPU.

Shapes: R rows in e groups, K inner dim, M and N outer dims.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(left: Tensor, right: Tensor, ends_e: Tensor) -> Tensor:
    """A product for each group of rows, the groups ending at `ends_e` (int32).

    Args:
        left: [R, K], whose rows are grouped, or [M, R], whose columns are.
        right: [e, K, N], one matrix a group, or [R, N], grouped like the columns of `left`.

    Returns:
        [R, N], or [e, M, N].
    """
    if left.device.type == "cpu" and torch.compiler.is_compiling():
        return _opaque_grouped_mm(left, right, ends_e)
    return F.grouped_mm(left, right, offs=ends_e)


# torch's compiler refuses float32 in grouped_mm, which the CPU has; it need not look inside.
@torch.library.custom_op("moe_ray::grouped_mm", mutates_args=())
def _opaque_grouped_mm(left: Tensor, right: Tensor, ends_e: Tensor) -> Tensor:
    return F.grouped_mm(left, right, offs=ends_e)


@_opaque_grouped_mm.register_fake
def _(left: Tensor, right: Tensor, ends_e: Tensor) -> Tensor:
    if right.ndim == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(ends_e.shape[0], left.shape[0], right.shape[1])
