"""Tensors as one safetensors image in memory, so that the snapshot of a step is already the file to be written.

The layout is that of https://github.com/huggingface/safetensors: the header's length as 8 bytes, little-endian,
the header as JSON, the tensors without gaps.
"""

import json
import math
from collections.abc import Mapping

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def take_snapshot(tensors: Mapping[str, Tensor], image: Tensor | None = None) -> Tensor:
    """Copy tensors of any device into an image in main memory.

    Args:
        image: an earlier result, whose memory is used again if the size is the same: touching new pages costs
            more than the copy.

    Returns:
        uint8 [bytes of the file].
    """
    # Wide types first, so that each tensor begins at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, length = {}, 0
    for name in names:
        tensor = tensors[name]
        end = length + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [length, end],
        }
        length = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    on_gpu = any(tensor.is_cuda for tensor in tensors.values())
    if image is None or image.numel() != begin + length:
        image = torch.empty(begin + length, dtype=torch.uint8, pin_memory=on_gpu)
    prefix = bytearray(len(text).to_bytes(8, "little") + text)
    image[:begin].copy_(torch.frombuffer(prefix, dtype=torch.uint8))
    for name in names:
        tensor, (start, end) = tensors[name], header[name]["data_offsets"]
        if math.prod(tensor.shape):
            part = image[begin + start : begin + end].view(tensor.dtype).view(tensor.shape)
            part.copy_(tensor.detach(), non_blocking=on_gpu)
    if on_gpu:
        torch.cuda.synchronize()
    return image
