"""What vLLM reads: a Hugging Face folder, which a checkpoint of ours becomes in the cache of the node."""

import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import time
from pathlib import Path

from moe_ray.checkpoint.export import export_folder
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.checkpoint.manifest import MANIFEST
from moe_ray.checkpoint.packs import files_identity
from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError, StorageError
from moe_ray.models.hf.config import architecture_of, is_hf_folder, read_quantization, read_tree
from moe_ray.private_folder import private_folder, user_cache
from moe_ray.serve_config import ServeConfig

_UNUSED_SECONDS = 7 * 24 * 3600.0
# What only our own engine has, and how each is left out.
_OURS = {
    "quantize": "none",
    "runner": "auto",
    "follow": False,
    "prefix_memory_bytes": 0,
    "prefix_folder": None,
    "prefix_prefetch": False,
}

_logger = logging.getLogger(__name__)


def check_vllm(config: ServeConfig, model: ModelConfig) -> None:
    """Raise a ConfigError unless vLLM is installed here and can serve such a model with these settings."""
    for field, default in _OURS.items():
        value = getattr(config, field)
        if value != default:
            raise ConfigError(
                f"serve.{field}={value} is not possible with serve.engine=vllm.", f"leave serve.{field} out."
            )
    architecture_of(model)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "serve.engine=vllm needs vLLM, which is not installed.",
            "install the extra 'vllm' on every node, in an environment of its own; see docs/api.md.",
        )


def folder_for_vllm(source: Path) -> Path:
    """The folder itself, or the checkpoint as one, which is written at its first start on this node.

    Raises:
        ConfigError: the experts are quantized in our format.
        StorageError: the cache cannot be written.
    """
    if is_hf_folder(source) and not (source / MANIFEST).exists():
        scheme = read_quantization(read_tree(source))
        if scheme != "none":
            raise ConfigError(
                f"{str(source)!r} has experts in {scheme}, which vLLM does not read.",
                "use serve.engine=moe_ray, or the model that the folder was made of.",
            )
        return source
    try:
        return _exported(source, private_folder(user_cache() / "vllm"))
    except OSError as error:
        raise StorageError(
            f"the cache for vLLM cannot be written: {error}.", "free space, or set XDG_CACHE_HOME."
        ) from None


def _exported(source: Path, cache: Path) -> Path:
    digest = hashlib.blake2b(files_identity(source).encode(), digest_size=16).hexdigest()
    folder = cache / digest
    with (cache / "lock").open("w") as lock:
        # Replicas that start together wait for the one that writes.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            _remove_unused(cache)
            _logger.info("writing %s for vLLM to %s", source, folder)
            export_folder(load_for_inference(source, dtype=None), folder)
        # The time of the last use.
        os.utime(folder)
    return folder


def _remove_unused(cache: Path) -> None:
    for folder in cache.iterdir():
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _UNUSED_SECONDS:
            _logger.info("removing %s", folder)
            shutil.rmtree(folder, ignore_errors=True)
