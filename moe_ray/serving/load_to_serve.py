"""A model as the settings of an endpoint say."""

from pathlib import Path

from moe_ray.checkpoint.inference import InferenceModel, load_for_inference
from moe_ray.private_folder import user_cache
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.vllm_folder import check_vllm


def load_to_serve(source: str | Path, config: ServeConfig) -> InferenceModel:
    """Load for a replica; on CPUs its weights are shared with the others of the node. vLLM reads them itself.

    Raises:
        CheckpointError: as `load_for_inference`.
        ConfigError: the experts cannot be quantized or offloaded as asked, or vLLM is asked for and cannot be had.
    """
    if config.engine == "vllm":
        described = load_for_inference(source, config.dtype, "meta")
        check_vllm(config, described.config.model)
        return described
    device = "cuda" if config.gpus_per_replica else "cpu"
    folder = None if config.weights_folder is None else Path(config.weights_folder)
    packs = None if config.weights_folder == "" or device != "cpu" else folder or user_cache() / "weights"
    return load_for_inference(
        source,
        config.dtype,
        device,
        quantize=config.quantize,
        packs=packs,
        expert_bytes=config.expert_memory_bytes,
        prefetch=config.expert_prefetch,
    )
