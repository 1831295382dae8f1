"""Experts that are brought into memory while the C++ is in the middle of a forward pass.

Shapes: T tokens, K experts a token.
"""

from ctypes import CFUNCTYPE, Array, c_int32, c_int64, c_void_p
from typing import Any

import numpy as np
import torch

from moe_ray.native.matrix import Matrix, as_matrix
from moe_ray.offload.experts import OffloadedExperts
from moe_ray.offload.resident import Views

# `acquire` of decode.cpp.
ACQUIRE = CFUNCTYPE(c_int32, c_int64, c_void_p, c_int64)


class OffloadedLayers:
    """The layers whose experts are offloaded, by their number in the model; knows nothing of the runner.

    Attributes:
        failure: why `acquire` could not do what it was asked.
    """

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._layers: dict[int, tuple[OffloadedExperts, Array[Matrix], Array[Matrix]]] = {}
        self.failure: BaseException | None = None

    def add(self, layer: int, experts: OffloadedExperts) -> tuple[Array[Matrix], Array[Matrix]]:
        """Matrices of a layer's experts, which `acquire` points to their weights."""
        some = experts.record.views(torch.empty(experts.record.num_bytes, dtype=torch.uint8))
        arrays = []
        for matrix in _matrices(some):
            # The type holds for all; the memory for none.
            matrix.data = matrix.scales = None
            count = len(experts.checksum_E)
            arrays.append((Matrix * count)(*[matrix] * count))
        self._layers[layer] = experts, arrays[0], arrays[1]
        return arrays[0], arrays[1]

    def acquire(self, layer: int, ids: Any, count: int) -> int:
        """Called by the C++, through which no exception passes; 0: the experts are there."""
        try:
            ids_TK = np.ctypeslib.as_array((c_int32 * count).from_address(ids)).reshape(-1, self._top_k)
            experts, w_in, w_out = self._layers[layer]
            assert experts.resident is not None
            for expert, views in experts.resident.acquire(experts.layer, ids_TK).items():
                w_in[expert], w_out[expert] = _matrices(views)
            return 0
        except BaseException as error:
            self.failure = error
            return 1


def _matrices(views: Views) -> tuple[Matrix, Matrix]:
    if "w_in_codes_e" in views:
        return (
            as_matrix(views["w_in_codes_e"], views["w_in_scales_e"]),
            as_matrix(views["w_out_codes_e"], views["w_out_scales_e"]),
        )
    return as_matrix(views["w_in_eGD"]), as_matrix(views["w_out_eDF"])
