"""Rotary positions in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` that holds both."""

from typing import Any

from moe_ray.errors import CheckpointError
from moe_ray.model_config import ModelConfig

# Our setting of each key, by type; other keys would change the frequencies in ways that we do not have.
_KEYS: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
}
# What transformers takes for a gpt-oss whose config.json says nothing.
_GPT_OSS: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_rope(tree: dict[str, Any], default_theta: float) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a `ModelConfig` from a config.json.

    Raises:
        CheckpointError: a type or key that has no counterpart here.
    """
    default = _GPT_OSS if tree.get("model_type") == "gpt_oss" else {}
    rope: dict[str, Any] = dict(tree.get("rope_scaling") or tree.get("rope_parameters") or default)
    theta = rope.pop("rope_theta", tree.get("rope_theta") or default_theta)
    # Old files say `type`, some say both.
    old_kind = rope.pop("type", "default")
    kind = rope.pop("rope_type", old_kind)
    if kind not in _KEYS:
        raise CheckpointError(
            f"config.json has rope_type={kind!r}, which is not supported.", f"use one of {', '.join(_KEYS)}."
        )
    for key, value in rope.items():
        if key not in _KEYS[kind] and value is not None and (key, value) != ("partial_rotary_factor", 1.0):
            raise CheckpointError(
                f"config.json has {key}={value!r} for rotary positions of type {kind!r}, which is not supported.",
                "remove the key if it has no effect.",
            )
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    given: dict[str, Any] = {field: rope[key] for key, field in _KEYS[kind].items() if rope.get(key) is not None}
    if kind == "yarn" and rope.get("truncate", True) is None:
        given["truncate"] = False
    longest = tree.get("max_position_embeddings")
    if kind != "linear":
        given.setdefault("original_length", longest)
        if kind == "yarn" and longest:
            given.setdefault("factor", longest / given["original_length"])
    return {"rope_theta": theta, "rope_scaling": {"type": kind, **given}}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """The keys of config.json, those that `transformers` 5 writes and those that earlier readers know."""
    scaling = config.rope_scaling
    if scaling is None:
        rope = {"rope_type": "default"}
    else:
        values = {key: getattr(scaling, field) for key, field in _KEYS[scaling.type].items()}
        rope = {"rope_type": scaling.type} | {key: value for key, value in values.items() if value is not None}
    return {
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
    }
