"""Write our model as a Hugging Face folder, one tensor at a time.

The safetensors format is eight bytes with the length of a JSON header, the header, and the tensors' bytes. The
library writes a file only from tensors that are all in memory in their final form; experts that we keep stacked
would be there twice.
"""

import json
import shutil
import struct
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_ray.durable import sync
from moe_ray.errors import ConfigError, StorageError
from moe_ray.models.hf.architectures import Architecture
from moe_ray.models.hf.config import CONFIG_FILE, architecture_of, write_config, write_quantization
from moe_ray.models.hf.files import CODE_DTYPES, DTYPES, INDEX_FILE, SINGLE_FILE
from moe_ray.models.hf.sidecars import TOKENIZER_FILE, token_ids
from moe_ray.models.hf.tensors import Piece, pieces
from moe_ray.models.quantize import scheme_of
from moe_ray.models.transformer import Transformer

MAX_SHARD_BYTES = 5_000_000_000
_NAMES = {dtype: name for name, dtype in (DTYPES | CODE_DTYPES).items()}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a file to be written."""

    piece: Piece
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * self.piece.view.numel()


def save_folder(
    model: Transformer,
    folder: Path,
    *,
    tokenizer_json: bytes,
    sidecars: Mapping[str, bytes],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Architecture:
    """Write config.json, weights, tokenizer and sidecar files; the folder appears whole or not at all.

    Args:
        model: with all its experts on one device, perhaps quantized.
        tokenizer_json: content of the tokenizer.json.
        sidecars: other small files by name.
        dtype: type of the weights in the files, except that expert biases stay as they are; default: the model's.
        max_shard_bytes: most tensor bytes of one file, unless one tensor has more.

    Returns:
        The architecture that was written.

    Raises:
        ConfigError: the folder exists, or no architecture of `transformers` can express the model.
        StorageError: it cannot be written.
    """
    architecture = architecture_of(model.config)
    tensors = list(_tensors(model, architecture, dtype))
    config = write_config(model.config, architecture) | write_quantization(scheme_of(model)) | token_ids(sidecars)
    config["dtype"] = str(dtype or model.embed.weight.dtype).removeprefix("torch.")
    with _staged(folder) as staging:
        for name, content in {**sidecars, TOKENIZER_FILE: tokenizer_json, CONFIG_FILE: _json(config)}.items():
            (staging / name).write_bytes(content)
        _write_weights(staging, tensors, max_shard_bytes)
    return architecture


def check_free(folder: Path) -> None:
    """Raise a ConfigError if something is already there."""
    try:
        if folder.exists():
            raise ConfigError(f"{str(folder)!r} exists already.", "give a new folder, or move the old one away.")
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{str(folder)!r} cannot be written: {error.strerror}.", "free space, or give another folder."
    )


@contextmanager
def _staged(folder: Path) -> Generator[Path]:
    """A folder aside, which takes the place of `folder` when all went well."""
    check_free(folder)
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Of its own name: another export to the same folder must not write into this one.
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield staging
        staging.chmod(0o755)
        for path in (*staging.iterdir(), staging):
            sync(path)
        check_free(folder)
        staging.rename(folder)
        sync(folder.parent)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _tensors(model: Transformer, architecture: Architecture, dtype: torch.dtype | None) -> Iterator[_Tensor]:
    parameters = dict(model.named_parameters())
    for piece in pieces(model, architecture):
        is_cast = dtype is not None and piece.ours in parameters
        yield _Tensor(piece, dtype if is_cast else piece.view.dtype)


def _write_weights(folder: Path, tensors: Sequence[_Tensor], max_shard_bytes: int) -> None:
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _write_file(folder / SINGLE_FILE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard)
        weight_map |= {tensor.piece.name: name for tensor in shard}
    total = sum(tensor.num_bytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_FILE).write_bytes(_json(index))


def _split(tensors: Sequence[_Tensor], max_shard_bytes: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _write_file(path: Path, tensors: Sequence[_Tensor]) -> None:
    # Wide types first, so that each tensor starts at a multiple of its item size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        shape = list(tensor.piece.shape)
        header[tensor.piece.name] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            stored = tensor.piece.as_stored(tensor.dtype).detach().cpu()
            file.write(memoryview(stored.flatten().view(torch.uint8).numpy()))


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()
