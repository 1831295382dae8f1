"""config.json to `ModelConfig` and back, with an error for whatever one of them cannot say."""

import json
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.model_config import TRAINING_FIELDS, ModelConfig
from moe_ray.models.hf.architectures import (
    ARCHITECTURES,
    FP8_BLOCK,
    IGNORED_KEYS,
    ROPE_KEYS,
    Architecture,
)
from moe_ray.models.hf.rope import read_rope, write_rope
from moe_ray.models.quantize import Scheme
from moe_ray.section import Quantize

CONFIG_FILE = "config.json"
_MAX_LAYERS = 10_000
_OURS = "moe_ray"
# One number under three names.
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def is_hf_folder(path: Path) -> bool:
    """Whether a folder is in the Hugging Face layout."""
    return (path / CONFIG_FILE).is_file()


def read_tree(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error.strerror}.", "give the folder of a Hugging Face model."
        ) from None
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{str(path)!r} is no JSON object.", "download the file again.")
    return tree


def read_config(
    tree: dict[str, Any], architectures: dict[str, Architecture] = ARCHITECTURES
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a config.json, and the settings that it decides, for `ModelConfig.model_validate`.

    Raises:
        CheckpointError: it says something that our model cannot do; the key and value are named.
    """
    architecture = architectures.get(str(tree.get("model_type")))
    if architecture is None:
        raise CheckpointError(
            f"config.json has model_type={tree.get('model_type')!r}, which is not supported here.",
            f"use one of {', '.join(architectures)}; model.init_from takes a Mixture-of-Experts model, "
            "model.upcycle_from a dense one.",
        )
    try:
        return architecture, _read_settings(_with_one_expert_count(tree, architecture), architecture)
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"config.json has a value of the wrong type: {' '.join(str(error).split())}.",
            "download the file again.",
        ) from None


def _read_settings(tree: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    _check_keys(tree, architecture)
    _check_quantization(tree)
    num_layers = tree.get("num_hidden_layers")
    if isinstance(num_layers, int) and num_layers > _MAX_LAYERS:
        raise CheckpointError(f"config.json has num_hidden_layers={num_layers}.", f"use at most {_MAX_LAYERS}.")
    settings = dict(architecture.implied)
    for key, field in architecture.keys.items():
        if key not in tree and key not in architecture.defaults:
            raise CheckpointError(f"config.json lacks {key}.", "download the file again.")
        settings[field] = tree.get(key, architecture.defaults.get(key))
    if settings["num_kv_heads"] is None:
        settings["num_kv_heads"] = settings["num_heads"]
    if settings.get("attention") != "mla" and settings.get("head_dim") is None:
        settings["head_dim"] = settings["dim"] // settings["num_heads"]
    return settings | read_rope(tree, architecture.rope_theta) | _read_layers(tree, architecture)


def validate_settings(settings: dict[str, Any], folder: str | Path) -> ModelConfig:
    """The `ModelConfig` of settings that were read from a folder.

    Raises:
        CheckpointError: a value is of the wrong type or out of bounds.
        ConfigError: the values are impossible together.
    """
    try:
        return ModelConfig.model_validate(settings)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{CONFIG_FILE} in {str(folder)!r} gives model.{field}={first['input']!r}: {first['msg']}.",
            "mend the file.",
        ) from None


def write_config(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    """The config.json of `config` as this architecture; true only if `read_config` gives `config` back."""
    # Always a number: readers differ in what they make of null.
    head_dim = {"head_dim": config.qk_dim} if "head_dim" in architecture.keys else {}
    return {
        "architectures": [architecture.model_class],
        "model_type": architecture.name,
        **{key: getattr(config, field) for key, field in architecture.keys.items()},
        **head_dim,
        **{key: values[0] for key, values in architecture.constants.items()},
        **write_rope(config),
        **_write_layers(config, architecture),
        "use_cache": True,
    }


def write_quantization(scheme: Quantize) -> dict[str, Any]:
    """What config.json says of experts that are quantized in our way, which no other program reads."""
    return {} if scheme == "none" else {"quantization_config": {"quant_method": _OURS, "scheme": scheme}}


def read_quantization(tree: dict[str, Any]) -> Quantize:
    """How the experts in a folder are quantized in our way; none too where they are in another.

    Raises:
        CheckpointError: the scheme is unknown.
    """
    quantization = tree.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != _OURS:
        return "none"
    scheme = quantization.get("scheme")
    if quantization.keys() != {"quant_method", "scheme"} or scheme not in get_args(Scheme):
        raise CheckpointError(
            f"config.json has quantization_config={quantization!r}, which is not supported.",
            f"use a scheme of {', '.join(get_args(Scheme))} and nothing besides.",
        )
    return scheme


def architecture_of(config: ModelConfig) -> Architecture:
    """The Hugging Face architecture that computes what `config` does.

    Raises:
        ConfigError: there is none; the settings that the nearest one lacks are named.
    """
    nearest: tuple[Architecture, list[str]] | None = None
    # The preset's first: it is the nearest whatever it lacks.
    for architecture in sorted(ARCHITECTURES.values(), key=lambda a: a.name != config.preset):
        lost = _lost(config, architecture)
        if not lost:
            return architecture
        if nearest is None or (config.preset not in ARCHITECTURES and len(lost) < len(nearest[1])):
            nearest = architecture, lost
    assert nearest is not None
    architecture, lost = nearest
    settings = ", ".join(f"model.{field}={getattr(config, field)!r}" for field in lost)
    raise ConfigError(
        f"{settings} cannot be expressed by {architecture.model_class}, the nearest architecture of transformers.",
        f"only models with the settings of one of {', '.join(ARCHITECTURES)} can be exported.",
    )


def _lost(config: ModelConfig, architecture: Architecture) -> list[str]:
    """Settings that are different after `config` was written and read back."""
    wanted = _meaning(config)
    if config.attention != architecture.implied.get("attention", "gqa"):
        return ["attention", *(field for field in wanted if field != "attention")]
    if architecture.name == "deepseek_v3":
        if not config.num_shared_experts:
            return ["num_shared_experts"]
        # Groups are ranked by their two best experts.
        if config.num_experts < 2 * config.num_expert_groups:
            return ["num_expert_groups"]
    _, settings = read_config(write_config(config, architecture))
    found = _meaning(ModelConfig.model_validate({"preset": "custom"} | settings))
    return [field for field in wanted if wanted[field] != found.get(field)]


def _with_one_expert_count(tree: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    key = next((key for key in _EXPERT_COUNTS if key in architecture.keys), None)
    others = {name: tree[name] for name in _EXPERT_COUNTS if name != key and name in tree}
    if key is None or not others:
        return tree
    return {key: next(iter(others.values()))} | {name: tree[name] for name in tree if name not in others}


def _check_keys(tree: dict[str, Any], architecture: Architecture) -> None:
    known = architecture.keys.keys() | architecture.special_keys | ROPE_KEYS | IGNORED_KEYS
    for key, value in tree.items():
        allowed = architecture.constants.get(key)
        if allowed is not None and value not in allowed:
            raise CheckpointError(
                f"config.json has {key}={value!r}, which is not supported for {architecture.name}.",
                f"only {key}={allowed[0]!r} is.",
            )
        # A leading underscore marks notes of the program that wrote the file.
        if allowed is None and key not in known and value is not None and not key.startswith("_"):
            raise CheckpointError(
                f"config.json has {key}={value!r}, which is unknown for {architecture.name}.",
                "remove the key if it has no effect on the model's output.",
            )


def _check_quantization(tree: dict[str, Any]) -> None:
    quantization = tree.get("quantization_config") or {}
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method == _OURS:
        read_quantization(tree)
    elif method not in (None, "fp8", "mxfp4") or (method == "fp8" and block != [FP8_BLOCK, FP8_BLOCK]):
        raise CheckpointError(
            f"config.json has a quantization_config of quant_method={method!r} and weight_block_size={block!r}, "
            "which is not supported.",
            f"use weights that are not quantised, or in fp8 with blocks of {FP8_BLOCK}, or in mxfp4.",
        )


def _read_layers(tree: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """Which layers have a window, and which are Mixture-of-Experts."""
    if architecture.name == "qwen3_moe":
        window = tree.get("sliding_window", 4096) if tree.get("use_sliding_window") else None
        return {"sliding_window": window} | _read_moe_layers(tree)
    kinds = tree.get("layer_types")
    if architecture.name == "gpt_oss":
        num_layers = tree["num_hidden_layers"]
        kinds = kinds or [("sliding_attention", "full_attention")[i % 2] for i in range(num_layers)]
        return _read_windows(kinds, tree.get("sliding_window", 128), num_layers)
    if kinds is not None and set(kinds) - {"full_attention"}:
        raise CheckpointError(
            f"config.json has layer_types={kinds!r}, which is not supported for {architecture.name}.",
            "only full_attention is.",
        )
    return {}


def _read_windows(kinds: list[str], window: int | None, num_layers: int) -> dict[str, Any]:
    full = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
    if window is None or len(full) == num_layers == len(kinds):
        return {"sliding_window": None, "full_attention_every": 0}
    every = full[0] if full else 0
    expected = list(range(every, num_layers + 1, every)) if every else []
    if set(kinds) - {"full_attention", "sliding_attention"} or len(kinds) != num_layers or full != expected:
        raise CheckpointError(
            f"config.json has layer_types={kinds!r} for {num_layers} layers, which is not supported.",
            "every n-th layer may be full_attention and the others sliding_attention.",
        )
    return {"sliding_window": window, "full_attention_every": every}


def _read_moe_layers(tree: dict[str, Any]) -> dict[str, Any]:
    num_layers, step = tree["num_hidden_layers"], tree.get("decoder_sparse_step", 1)
    dense = set(tree.get("mlp_only_layers") or [])
    layers = [i for i in range(num_layers) if i not in dense and (i + 1) % step == 0]
    for every in dict.fromkeys((step, *range(1, num_layers + 1))):
        first = layers[0] - every + 1 if layers else 0
        if first >= 0 and list(range(first + every - 1, num_layers, every)) == layers:
            return {"num_dense_layers": first, "moe_every": every}
    raise CheckpointError(
        f"config.json has mlp_only_layers={sorted(dense)} with decoder_sparse_step={step}, not supported here.",
        "after some dense layers, every n-th layer may be Mixture-of-Experts.",
    )


def _write_layers(config: ModelConfig, architecture: Architecture) -> dict[str, Any]:
    if architecture.name == "qwen3_moe":
        is_regular = config.num_dense_layers == 0
        dense = [] if is_regular else [i for i in range(config.num_layers) if i not in config.moe_layers]
        return {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "decoder_sparse_step": config.moe_every if is_regular else 1,
            "mlp_only_layers": dense,
        }
    if architecture.name == "gpt_oss":
        kinds = ["full_attention" if w is None else "sliding_attention" for w in _windows(config)]
        # transformers asks for a window even where no layer has one.
        return {"sliding_window": config.sliding_window or 128, "layer_types": kinds}
    return {"num_nextn_predict_layers": 0} if architecture.name == "deepseek_v3" else {}


def _windows(config: ModelConfig) -> list[int | None]:
    return [config.window(layer) for layer in range(config.num_layers)]


def _meaning(config: ModelConfig) -> dict[str, Any]:
    """All settings that decide the output, in one form for what is the same; those without effect left out."""
    meaning = config.model_dump(exclude=set(TRAINING_FIELDS - {"max_sequence_length"}))
    meaning |= {
        "head_dim": config.qk_dim,
        "sliding_window": _windows(config),
        "moe_every": list(config.moe_layers),
        "route_norm": config.route_norm or config.softmax_after_top_k,
        "rope_scaling": write_rope(config)["rope_scaling"],
    }
    without_effect = ["full_attention_every", "num_dense_layers", "softmax_after_top_k", "rope_interleaved"]
    if config.attention == "gqa":
        without_effect += ["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
    else:
        without_effect.remove("rope_interleaved")
    if len(config.moe_layers) == config.num_layers:
        without_effect.append("dense_dim")
    if config.activation != "swigluoai":
        without_effect += ["swiglu_alpha", "swiglu_limit"]
    if config.num_expert_groups == config.num_limited_groups:
        without_effect += ["num_expert_groups", "num_limited_groups"]
    return {field: value for field, value in meaning.items() if field not in without_effect}
