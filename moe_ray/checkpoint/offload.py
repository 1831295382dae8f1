"""Load a model that is larger than memory: its experts go one by one to a file, all else into memory."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from moe_ray.errors import ConfigError
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.moe import MoE
from moe_ray.models.quantize import quantize
from moe_ray.models.transformer import Transformer, materialize
from moe_ray.offload.expert_file import write_experts
from moe_ray.offload.experts import OffloadedExperts, offloaded_experts
from moe_ray.private_folder import private_folder
from moe_ray.section import Quantize

# Copies the tensors of a checkpoint whose names are wanted into those of a model.
Read = Callable[[Transformer, Callable[[str], bool]], None]


@torch.no_grad()
def load_offloaded(
    model: Transformer, skeleton: Transformer, path: Path, scheme: Quantize, read: Read
) -> Transformer:
    """Write all experts to `path` and return the model without them, in memory. Holds one expert at a time.

    Args:
        model: on the meta device, of the final types, with experts that are not quantized.
        skeleton: the same with offloaded experts, which the result shares.

    Raises:
        ConfigError: the file cannot be written.
    """
    moes, offloaded = list(model.moe_modules()), list(offloaded_experts(skeleton))
    layers = [_cut(moe) for moe in moes]
    for part in (model, *offloaded):
        materialize(part, "cpu")
    for moe, experts in zip(moes, layers, strict=True):
        moe.router.init_state("")
        moe.register_module("experts", experts)
    read(model, lambda name: ".ffn.experts." not in name)
    try:
        private_folder(path.parent)
        checksums = write_experts(path, offloaded[0].record, _each(model, layers, offloaded, scheme, read))
    except OSError as error:
        size = offloaded[0].record.num_bytes * model.config.num_experts * len(layers)
        raise ConfigError(
            f"the experts cannot be offloaded to {str(path.parent)!r}: {error}.",
            f"set serve.weights_folder to a folder of yours with room for {size} bytes.",
        ) from error
    checksums_LE = torch.tensor(checksums).view(len(layers), -1)
    for moe, place, checksum_E in zip(moes, offloaded, checksums_LE, strict=True):
        place.checksum_E.copy_(checksum_E)
        moe.register_module("experts", place)
    return model.requires_grad_(False).eval()


def _cut(moe: MoE) -> GroupedExperts:
    """Take the experts out of a layer, all but one, whose place in the layer may change."""
    experts = moe.experts
    for name, parameter in list(experts.named_parameters()):
        setattr(experts, name, nn.Parameter(parameter.detach()[:1], requires_grad=False))
    moe.register_module("experts", None)
    return experts


def _each(
    model: Transformer,
    layers: list[GroupedExperts],
    offloaded: list[OffloadedExperts],
    scheme: Quantize,
    read: Read,
) -> Iterator[dict[str, Tensor]]:
    """The weights of each expert, layer after layer, as the final model has them; keeps their biases."""
    names = {id(module): name for name, module in model.named_modules()}
    for experts, place in zip(layers, offloaded, strict=True):
        prefix = f"{names[id(experts)]}."
        materialize(experts, "cpu")
        for index in range(model.config.num_experts):
            for each in layers:
                each.first_expert = index
            read(model, lambda name, prefix=prefix: name.startswith(prefix))
            if experts.b_in_eG is not None:
                cast(Tensor, place.b_in_EG)[index] = experts.b_in_eG[0]
                cast(Tensor, place.b_out_ED)[index] = experts.b_out_eD[0]
            yield _weights(experts, scheme)
        experts.to("meta")


def _weights(experts: GroupedExperts, scheme: Quantize) -> dict[str, Tensor]:
    """Named as `GroupedExperts` or `QuantizedExperts` name them."""
    if scheme == "none":
        return {"w_in_eGD": experts.w_in_eGD[0], "w_out_eDF": experts.w_out_eDF[0]}
    tensors = {}
    for name, weight in (("w_in", experts.w_in_eGD), ("w_out", experts.w_out_eDF)):
        tensors[f"{name}_codes_e"], tensors[f"{name}_scales_e"] = quantize(weight[0], scheme)
    return tensors
