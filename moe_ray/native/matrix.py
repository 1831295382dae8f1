"""Weights as the C++ sees them, and their product with rows of numbers.

Shapes: T rows, N rows and D columns of a weight.
"""

import ctypes
from ctypes import Array, Structure, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from moe_ray.native.build import load

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}


class Matrix(Structure):
    """`Matrix` of model.hpp. It points to the memory of tensors, which have to outlive it."""

    _fields_ = (
        ("data", c_void_p),
        ("scales", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("type", c_int32),
    )


def as_matrix(weight: Tensor, scales: Tensor | None = None) -> Matrix:
    """A weight of shape [..., N, D], or codes and scales of `models.quantize`, where they lie."""
    assert weight.is_contiguous()
    columns = weight.shape[-1] * (2 if weight.dtype == torch.uint8 else 1)
    rows = weight.numel() // weight.shape[-1]
    data = None if scales is None else scales.data_ptr()
    return Matrix(weight.data_ptr(), data, rows, columns, TYPES[weight.dtype])


def as_matrices(weight_eND: Tensor, scales: Tensor | None = None) -> Array[Matrix]:
    """The weights of all experts of a layer, where they lie."""
    experts = [as_matrix(w_ND, None if scales is None else scales[e]) for e, w_ND in enumerate(weight_eND)]
    return (Matrix * len(experts))(*experts)


def multiply(matrix: Matrix, x_TD: Tensor) -> Tensor:
    """y_TN = x W^T in float32.

    Args:
        x_TD: float32, contiguous; unless the weight is float32, it may be rounded to bfloat16, or to
            16 bits and a factor of its row if the weight is quantized.
    """
    y_TN = torch.empty(len(x_TD), matrix.rows)
    x, y = c_void_p(x_TD.data_ptr()), c_void_p(y_TN.data_ptr())
    load().multiply(ctypes.byref(matrix), x, c_int64(len(x_TD)), y, torch.get_num_threads())
    return y_TN
