"""An engine for a loaded model, as the settings of an endpoint say."""

from dataclasses import replace
from pathlib import Path

from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.checkpoint.packs import files_identity
from moe_ray.models.quantize import quantize_experts
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.engine.cache import FREE_SHARE
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.responses import ResponseCache
from moe_ray.serving.engine.service import EngineService
from moe_ray.serving.engine.thread import EngineThread
from moe_ray.serving.engine.tier_store import Tiering
from moe_ray.serving.vllm_engine import VllmEngine
from moe_ray.serving.vllm_folder import folder_for_vllm


def start_engine(model: InferenceModel, config: ServeConfig, max_context: int) -> EngineService:
    """What answers the requests of one replica.

    Raises:
        ConfigError: as `build_engine`, or vLLM does not read the model.
    """
    if config.engine == "moe_ray":
        return EngineThread(
            build_engine(model, config, max_context), config.max_unfinished, config.max_queue_seconds
        )
    folder = folder_for_vllm(model.path)
    return VllmEngine(folder, model.tokenizer, model.config.model, config, max_context)


def build_engine(model: InferenceModel, config: ServeConfig, max_context: int) -> Engine:
    """The engine of one replica.

    Raises:
        ConfigError: the memory for keys and values holds no text, or quantize or runner cannot be as asked.
    """
    if config.quantize != "none" and model.quantize == "none":
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
        tiering=replace(
            _tiering(config.prefix_memory_bytes, config.prefix_folder, config.prefix_disk_bytes),
            prefetch=config.prefix_prefetch,
        ),
        identity=_identity(model.path, config),
        runner=config.runner,
    )


def build_response_cache(
    thread: EngineService, model: InferenceModel, config: ServeConfig
) -> ResponseCache | None:
    """The cache of finished answers in front of an engine; None if nothing is kept."""
    tiering = _tiering(config.response_memory_bytes, config.response_folder, config.response_disk_bytes)
    if not tiering and not config.response_cache_bytes:
        return None
    identity = f"{_identity(model.path, config)} {config.dtype} {config.engine} {config.runner}"
    return ResponseCache(thread, config.response_cache_bytes, tiering, identity)


def _tiering(memory_bytes: int, folder: str | None, disk_bytes: int) -> Tiering:
    return Tiering(memory_bytes, None if folder is None else Path(folder).expanduser().resolve(), disk_bytes)


def _identity(folder: Path, config: ServeConfig) -> str:
    """Changes whenever the files of a model do, or what becomes of them."""
    return f"{files_identity(folder)} {config.quantize}"
