"""A loaded model as a Hugging Face folder, with all that `transformers` and vLLM need beside the weights."""

from pathlib import Path

import torch

from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.models.hf.architectures import Architecture
from moe_ray.models.hf.save import MAX_SHARD_BYTES, save_folder
from moe_ray.models.hf.sidecars import TOKENIZER_FILE, complete_sidecars, read_sidecars


def export_folder(
    loaded: InferenceModel,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Architecture:
    """Write the folder, as `save_folder` does; returns the architecture that was written.

    Raises:
        ConfigError: the folder exists, or no architecture of `transformers` can express the model.
        StorageError: it cannot be written.
    """
    tokenizer_json = (loaded.path / TOKENIZER_FILE).read_bytes()
    length = loaded.model.config.max_sequence_length
    sidecars = complete_sidecars(read_sidecars(loaded.path), tokenizer_json, loaded.tokenizer.eos_id, length)
    return save_folder(
        loaded.model,
        folder,
        tokenizer_json=tokenizer_json,
        sidecars=sidecars,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
