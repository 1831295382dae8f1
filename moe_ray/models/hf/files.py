"""Read the weight files of a Hugging Face folder, tensor by tensor, without loading what is not asked for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_ray.errors import CheckpointError
from moe_ray.models.hf.architectures import FP8_BLOCK
from moe_ray.models.hf.dequantize import dequantize_fp8, dequantize_mxfp4

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FP4_BLOCKS, _FP4_SCALES, _FP8_SCALES = "_blocks", "_scales", "_scale_inv"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What stands for weights only together with scales.
CODE_DTYPES = {"I8": torch.int8, "U8": torch.uint8}


class WeightFiles:
    """The tensors of a folder by name.

    Files are mapped into memory: what is read costs memory only until it has been copied.
    """

    def __init__(self, folder: Path) -> None:
        """Open all files and read their headers.

        Raises:
            CheckpointError: a file is missing, truncated or lacks what the index says that it has.
        """
        self._folder = folder
        self._sources: dict[str, tuple[Path, Any]] = {}
        wanted = _read_index(folder)
        for file_name in sorted(set(wanted.values())) or [SINGLE_FILE]:
            path = folder / file_name
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118
                # The index decides where two files have a tensor of one name.
                if wanted.get(name, file_name) == file_name:
                    self._sources[name] = path, handle
        for name, file_name in wanted.items():
            if name not in self._sources:
                raise CheckpointError(
                    f"{str(folder / file_name)!r} lacks the tensor {name}, which {INDEX_FILE} says it has.",
                    "download the folder again.",
                )

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor as it is stored, or some rows of its first dim; what is quantised is dequantised.

        Raises:
            CheckpointError: it cannot be read, or is of a type that is not supported.
        """
        self.dtype(name)
        first, *scales = self._parts(name)
        stored = self._read(first, rows)
        if not scales:
            return stored
        if first == name:
            return dequantize_fp8(stored, self._read(scales[0]))
        return dequantize_mxfp4(stored, self._read(scales[0], rows))

    def read_exact(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor that is stored in this type.

        Raises:
            CheckpointError: it cannot be read, or is of another type.
        """
        stored = self._slice(name).get_dtype()
        if (DTYPES | CODE_DTYPES).get(stored) != dtype:
            raise CheckpointError(
                f"{str(self._sources[name][0])!r} has {name} of type {stored} where config.json asks for {dtype}.",
                "use the config.json that belongs to the weights.",
            )
        return self._read(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type in which a tensor is stored; bfloat16 if it is quantised.

        Raises:
            CheckpointError: the type is not supported.
        """
        first, *scales = self._parts(name)
        stored = self._slice(first).get_dtype()
        if stored == ("F8_E4M3" if first == name else "U8") and scales:
            return torch.bfloat16
        if stored not in DTYPES:
            raise CheckpointError(
                f"{str(self._sources[first][0])!r} has {first} of type {stored}, which is not supported.",
                f"convert the weights to one of {', '.join(DTYPES)}.",
            )
        return DTYPES[stored]

    def check(self, shapes: Mapping[str, tuple[int, ...]], is_skipped: Callable[[str], bool]) -> None:
        """Compare names and shapes with what the model needs.

        Raises:
            CheckpointError: a tensor is missing, of another shape, or neither needed nor skipped.
        """
        needed = {}
        for name, shape in shapes.items():
            first, *scales = self._parts(name)
            needed[first] = shape if first == name else _fp4_blocks(shape)
            if scales:
                needed[scales[0]] = _fp8_scales(shape) if first == name else needed[first][:-1]
        for name, shape in needed.items():
            if name not in self._sources:
                raise CheckpointError(
                    f"{str(self._folder)!r} lacks the tensor {name}.",
                    "download the folder again, or mend its config.json, which asks for the tensor.",
                )
            stored = tuple(self._slice(name).get_shape())
            if stored != shape:
                raise CheckpointError(
                    f"{str(self._sources[name][0])!r} has {name} of shape {stored} "
                    f"where config.json asks for {shape}.",
                    "use the config.json that belongs to the weights.",
                )
        for name, (path, _) in self._sources.items():
            if name not in needed and not is_skipped(name):
                raise CheckpointError(
                    f"{str(path)!r} has the tensor {name}, for which the model of its config.json has no place.",
                    "use the config.json that belongs to the weights.",
                )

    def _parts(self, name: str) -> tuple[str, ...]:
        """The tensors of the files that `name` is made of: itself, or quantised numbers and their scales."""
        if name + _FP4_BLOCKS in self._sources:
            return name + _FP4_BLOCKS, name + _FP4_SCALES
        return (name, name + _FP8_SCALES) if name + _FP8_SCALES in self._sources else (name,)

    def _slice(self, name: str) -> Any:
        return self._sources[name][1].get_slice(name)

    def _read(self, name: str, rows: slice | None = None) -> Tensor:
        path, handle = self._sources[name]
        try:
            return handle.get_tensor(name) if rows is None else handle.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from None


def _fp8_scales(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-size // FP8_BLOCK) for size in shape)


def _fp4_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Input and output dims are swapped, and 32 numbers of the input dim are a block of 16 bytes."""
    *experts, inputs, outputs = shape
    return (*experts, outputs, inputs // 32, 16)


def _read_index(folder: Path) -> dict[str, str]:
    """File of each tensor; empty if the folder has one file without an index."""
    path = folder / INDEX_FILE
    if not path.is_file():
        return {}
    try:
        files = json.loads(path.read_bytes())["weight_map"]
        names = {str(name): str(file_name) for name, file_name in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{str(path)!r} is no index of weights.", "download the file again.") from None
    for file_name in set(names.values()):
        if Path(file_name).name != file_name:
            raise CheckpointError(
                f"{str(path)!r} names the file {file_name!r} outside the folder.", "use a trusted folder."
            )
    return names


def _open(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(
            f"the weight file {str(path)!r} is missing.",
            "download it; only weights in the safetensors format can be read.",
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"the weight file {str(path)!r} is damaged: {' '.join(str(error).split())}.", "download the file again."
    )
