"""An engine for a loaded model, as the settings of an endpoint say."""

from pathlib import Path

from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.config import ServeConfig
from moe_ray.models.quantize import quantize_experts
from moe_ray.serving.engine.cache import FREE_SHARE
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.tiers import Tiering


def build_engine(model: InferenceModel, config: ServeConfig, max_context: int) -> Engine:
    """The engine of one replica.

    Raises:
        ConfigError: the memory for keys and values holds no text, or quantize or runner cannot be as asked.
    """
    if config.quantize != "none":
        quantize_experts(model.model, config.quantize)
    # As if all replicas were on one node. One that has a whole GPU shares its memory with nobody.
    sharers = 1 if config.gpus_per_replica >= 1 else config.max_replicas
    return Engine(
        model.model,
        model.tokenizer,
        max_batch_size=config.max_batch_size,
        max_context=max_context,
        kv_cache_bytes=config.kv_cache_bytes,
        free_share=FREE_SHARE / sharers,
        tiering=_tiering(config),
        identity=f"{_identity(model.path)} {config.quantize}",
        runner=config.runner,
    )


def _tiering(config: ServeConfig) -> Tiering | None:
    if not config.prefix_memory_bytes and config.prefix_folder is None:
        return None
    folder = None if config.prefix_folder is None else Path(config.prefix_folder).expanduser().resolve()
    return Tiering(config.prefix_memory_bytes, folder, config.prefix_disk_bytes)


def _identity(folder: Path) -> str:
    """Changes whenever the files of a model do."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return repr([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files])
