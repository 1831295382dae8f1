"""Weights of a Hugging Face folder into our model; each rank reads only its share."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_ray.errors import CheckpointError
from moe_ray.model_config import ModelConfig
from moe_ray.models.hf.architectures import ARCHITECTURES, Architecture
from moe_ray.models.hf.config import read_config, read_tree, validate_settings
from moe_ray.models.hf.files import WeightFiles
from moe_ray.models.hf.tensors import pieces, stored_shapes
from moe_ray.models.transformer import Transformer

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def read_model_config(folder: Path) -> ModelConfig:
    """The settings of the model in a folder.

    Raises:
        CheckpointError: config.json is missing or damaged, or something in it is not supported.
        ConfigError: the settings are impossible together.
    """
    architecture, settings = read_config(read_tree(folder))
    return validate_settings({"preset": architecture.name} | settings, folder)


@dataclass(frozen=True)
class OpenFolder:
    """A folder whose files are open and hold the whole of a model."""

    architecture: Architecture
    files: WeightFiles


def open_folder(
    folder: Path, model: Transformer, architectures: dict[str, Architecture] = ARCHITECTURES
) -> OpenFolder:
    """Open the files and compare them with `model`, which needs no memory yet.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
    """
    architecture, _ = read_config(read_tree(folder), architectures)
    files = WeightFiles(folder)
    _check_files(files, model, architecture)
    return OpenFolder(architecture, files)


def use_stored_dtypes(folder: OpenFolder, model: Transformer) -> None:
    """Give each tensor of a model on the meta device the type in which the folder stores it."""
    dtypes: dict[str, torch.dtype] = {}
    for piece in pieces(model, folder.architecture):
        if piece.is_quantized:
            continue
        stored = folder.files.dtype(piece.name)
        # Of parts of different types, the wider holds both.
        dtypes[piece.ours] = torch.promote_types(dtypes.get(piece.ours, stored), stored)
    for ours, dtype in dtypes.items():
        module_name, _, name = ours.rpartition(".")
        module = model.get_submodule(module_name)
        tensor = getattr(module, name)
        if isinstance(tensor, torch.nn.Parameter):
            tensor.data = tensor.data.to(dtype)
        else:
            setattr(module, name, tensor.to(dtype))


@torch.no_grad()
def load_weights(
    folder: OpenFolder, model: Transformer, is_wanted: Callable[[str], bool] = lambda name: True
) -> None:
    """Copy the weights of a folder, or this rank's share of them, over those of `model`, in its types.

    Args:
        is_wanted: whether to copy a tensor of `model`, given its name.
    """
    for piece in pieces(model, folder.architecture):
        if not is_wanted(piece.ours):
            continue
        if piece.is_quantized:
            piece.load(folder.files.read_exact(piece.name, piece.view.dtype))
        else:
            piece.load(folder.files.read(piece.name, piece.rows))


def _check_files(files: WeightFiles, model: Transformer, architecture: Architecture) -> None:
    """Raise a CheckpointError unless the files hold the whole of `model`, and nothing else that matters."""
    shapes = stored_shapes(model, architecture)
    num_layers, is_tied = model.config.num_layers, model.config.tie_embeddings

    def is_skipped(name: str) -> bool:
        layer = _LAYER.match(name)
        if is_tied and name == _HEAD:
            _check_tied(files)
        # Old files hold the frequencies, which follow from config.json, or the head that equals the embedding.
        is_derived = name.endswith(".rotary_emb.inv_freq") or (is_tied and name == _HEAD)
        # Layers after the last predict further tokens (DeepSeek-V3); transformers leaves them out as well.
        return is_derived or (layer is not None and int(layer[1]) >= num_layers)

    files.check(shapes, is_skipped)


def _check_tied(files: WeightFiles) -> None:
    if not torch.equal(files.read(_HEAD), files.read(_EMBEDDING)):
        raise CheckpointError(
            f"config.json has tie_word_embeddings=true, but {_HEAD} differs from {_EMBEDDING}.",
            "set tie_word_embeddings to false to use both, or remove the head.",
        )
