"""Weights that are published in eight or four bits, to the numbers that they stand for.

Shapes: E experts, R rows, C columns, N blocks of a row, B bytes of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ray.models.hf.architectures import FP8_BLOCK

# A float of 1 sign, 2 exponent and 1 mantissa bit (OCP Microscaling, E2M1).
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_EXPONENT_BIAS = 127


def dequantize_fp8(weight_RC: Tensor, scale_inv: Tensor) -> Tensor:
    """Multiply each block of 128 x 128 of a float8 matrix by its scale; float32 of shape [R, C].

    Args:
        scale_inv: float32 of shape [ceil(R / 128), ceil(C / 128)].
    """
    rows, columns = weight_RC.shape
    scale_RC = scale_inv.float().repeat_interleave(FP8_BLOCK, dim=0)[:rows]
    scale_RC = scale_RC.repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    return weight_RC.float() * scale_RC


def dequantize_mxfp4(blocks_ERNB: Tensor, scales_ERN: Tensor) -> Tensor:
    """Unpack two numbers a byte, the low half first, and multiply them by their block's power of two.

    Args:
        blocks_ERNB: uint8.
        scales_ERN: biased exponents, uint8.

    Returns:
        bfloat16, which is exact, of shape [E, N * B * 2, R]: rows and columns are swapped, as in gpt-oss.
    """
    pairs = torch.tensor([(_FP4[byte & 15], _FP4[byte >> 4]) for byte in range(256)], dtype=torch.bfloat16)
    experts, rows = blocks_ERNB.shape[:2]
    out = torch.empty(experts, rows, 2 * blocks_ERNB[0, 0].numel(), dtype=torch.bfloat16)
    # One expert at a time: indices take four times the memory of the bytes.
    for expert, (blocks_RNB, scales_RN) in enumerate(zip(blocks_ERNB, scales_ERN, strict=True)):
        values = F.embedding(blocks_RNB.int(), pairs).flatten(2)
        out[expert] = torch.ldexp(values, scales_RN.int().sub_(_EXPONENT_BIAS).unsqueeze(-1)).flatten(1)
    return out.transpose(1, 2)
