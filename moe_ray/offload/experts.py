"""Experts whose weights lie in a file, in the place of those of a model that only generates.

Shapes: D model dim, R rows (routed tokens, grouped by expert), F expert hidden dim, G = 2 * F where gated, else F,
E experts.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ray.models.experts import GroupedExperts, grouped_feed_forward
from moe_ray.models.quantize import QuantizedExperts, dequantize
from moe_ray.models.router import Routing
from moe_ray.models.transformer import Transformer
from moe_ray.offload.expert_file import ExpertFile
from moe_ray.offload.record import record_of
from moe_ray.offload.resident import ResidentExperts, Views


class OffloadedExperts(nn.Module):
    """As `GroupedExperts` or `QuantizedExperts`, without gradients.

    Args:
        experts: those that it stands for, of which only shapes and types matter.
        num_experts: E.
        layer: of this one among the MoE layers.

    Attributes:
        record: how an expert lies in memory.
        checksum_E: of the records, int64.
        b_in_EG, b_out_ED: biases, which stay in memory.
        resident: the experts of all layers that are in memory; None before `open_experts`.
        weights: of those that the router chose last, by expert.
    """

    checksum_E: Tensor
    b_in_EG: Tensor | None
    b_out_ED: Tensor | None

    def __init__(self, experts: GroupedExperts | QuantizedExperts, num_experts: int, layer: int) -> None:
        super().__init__()
        self.activation = experts.activation
        self.record = record_of(experts)
        self.layer = layer
        self.resident: ResidentExperts | None = None
        self.weights: Mapping[int, Views] = {}
        for name, bias in (("b_in_EG", experts.b_in_eG), ("b_out_ED", experts.b_out_eD)):
            empty = None if bias is None else torch.empty_like(bias, requires_grad=False)
            self.register_buffer(name, empty)
        self.register_buffer("checksum_E", torch.empty(num_experts, dtype=torch.int64))

    def acquire(self, router: nn.Module, args: Any, routing: Routing) -> None:
        """Called when the router has chosen: bring its choice into memory."""
        assert self.resident is not None
        self.weights = self.resident.acquire(self.layer, routing.expert_ids_TK.numpy())

    def forward(self, x_RD: Tensor, tokens_per_expert_E: Tensor, max_kept_rows: int | None = None) -> Tensor:
        """As `GroupedExperts.forward`, expert by expert: weights are used where they lie."""
        y_RD, end = torch.zeros_like(x_RD), 0
        for expert, count in enumerate(tokens_per_expert_E.tolist()):
            rows, end = slice(end, end + count), end + count
            if count:
                y_RD[rows] = self._apply_one(expert, x_RD[rows], tokens_per_expert_E[expert : expert + 1])
        return y_RD

    def _apply_one(self, expert: int, x_RD: Tensor, count: Tensor) -> Tensor:
        weights = self.weights[expert]
        if "w_in_codes_e" in weights:
            w_in, w_out = (
                dequantize(weights[f"{name}_codes_e"], weights[f"{name}_scales_e"], x_RD.dtype)
                for name in ("w_in", "w_out")
            )
        else:
            w_in, w_out = weights["w_in_eGD"], weights["w_out_eDF"]
        b_in, b_out = (
            None if bias is None else bias[expert : expert + 1] for bias in (self.b_in_EG, self.b_out_ED)
        )
        return grouped_feed_forward(x_RD, count, w_in[None], w_out[None], b_in, b_out, self.activation)


def offload_experts(model: Transformer) -> None:
    """Replace the experts of a model on the meta device."""
    for layer, moe in enumerate(model.moe_modules()):
        experts = moe.experts
        with torch.device("meta"):
            offloaded = OffloadedExperts(experts, model.config.num_experts, layer)
        moe.register_module("experts", offloaded.eval())


def offloaded_experts(model: Transformer) -> Iterator[OffloadedExperts]:
    """Of each MoE layer; none if the experts of the model are in memory."""
    for moe in model.moe_modules():
        experts: nn.Module = moe.experts
        if isinstance(experts, OffloadedExperts):
            yield experts


def open_experts(model: Transformer, path: Path, budget_bytes: int, prefetch: bool) -> None:
    """Serve the offloaded experts of a model from their file.

    Raises:
        ConfigError: the budget is too small.
        StorageError: the file cannot be opened.
    """
    layers = list(offloaded_experts(model))
    record = layers[0].record
    checksums = [checksum for experts in layers for checksum in experts.checksum_E.tolist()]
    file = ExpertFile(path, record.num_bytes, checksums)
    num_experts = model.config.num_experts
    resident = ResidentExperts(file, record, len(layers), num_experts, budget_bytes, prefetch)
    for experts, moe in zip(layers, model.moe_modules(), strict=True):
        experts.resident = resident
        moe.router.register_forward_hook(experts.acquire)
