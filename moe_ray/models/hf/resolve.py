"""`model.init_from` and `model.upcycle_from`: the architecture comes from a folder, not from the settings."""

from pathlib import Path
from typing import Any

from moe_ray.config import Config, build_config
from moe_ray.errors import ConfigError
from moe_ray.model_config import TRAINING_FIELDS, ModelConfig
from moe_ray.models.hf.architectures import DENSE_ARCHITECTURES
from moe_ray.models.hf.config import read_config, read_quantization, read_tree, validate_settings
from moe_ray.models.hf.sidecars import TOKENIZER_FILE
from moe_ray.presets import PRESETS

# What a dense model says nothing about, and the settings decide.
_OPEN_IN_UPCYCLING = frozenset(
    {
        *("num_experts", "top_k", "num_dense_layers", "moe_every", "router", "score_func", "softmax_after_top_k"),
        *("route_norm", "route_scale", "router_bias", "noisy_top_k", "num_expert_groups", "num_limited_groups"),
        "expert_bias",
    }
)


def resolve_model(config: Config) -> Config:
    """The same settings with every field of the model known; without a folder to start from, unchanged.

    The folder decides the architecture. How the model is trained is for the settings to say, as is what a dense
    model leaves open when it is upcycled. Resolving what is resolved changes nothing.

    Raises:
        CheckpointError: the folder's config.json is missing, damaged or not supported.
        ConfigError: a setting contradicts the folder.
    """
    field = "init_from" if config.model.init_from is not None else "upcycle_from"
    given = getattr(config.model, field)
    if given is None:
        return config
    folder = Path(given).expanduser().resolve()
    found = _found(folder, field)
    _check_agreement(config.model, found, f"model.{field}={given!r}")
    decided = found.keys() - TRAINING_FIELDS
    chosen = {name: getattr(config.model, name) for name in config.model.model_fields_set - decided}
    model = validate_settings(found | chosen | {field: str(folder)}, folder)
    tree = config.model_dump(mode="json")
    tree["model"] = model.model_dump(mode="json")
    if config.data.tokenizer is None:
        tree["data"]["tokenizer"] = _tokenizer(config, folder)
    return build_config(tree)


def _found(folder: Path, field: str) -> dict[str, Any]:
    """All settings that the folder decides."""
    tree = read_tree(folder)
    if field == "init_from":
        architecture, settings = read_config(tree)
        scheme = read_quantization(tree)
        if scheme != "none":
            raise ConfigError(
                f"model.init_from={str(folder)!r} has experts in {scheme}, which cannot be trained.",
                "give the folder that it was made of.",
            )
        decided = ModelConfig.model_fields.keys() - TRAINING_FIELDS
        settings = {"preset": architecture.name} | settings
    else:
        _, settings = read_config(tree, DENSE_ARCHITECTURES)
        decided = ModelConfig.model_fields.keys() - TRAINING_FIELDS - _OPEN_IN_UPCYCLING
        settings["expert_dim"] = settings["dense_dim"]
    defaults = {name: ModelConfig.model_fields[name].default for name in decided}
    return defaults | settings


def _check_agreement(model: ModelConfig, found: dict[str, Any], source: str) -> None:
    wanted = validate_settings({"preset": "custom"} | found, source)
    for name in sorted(model.model_fields_set & found.keys() - TRAINING_FIELDS):
        mine, theirs = getattr(model, name), getattr(wanted, name)
        if mine != theirs:
            origin = f" of model.preset={model.preset}" if name in PRESETS[model.preset] else ""
            raise ConfigError(
                f"model.{name}={mine!r}{origin} contradicts {source}, which has {theirs!r}.", "leave it out."
            )
    longest = found["max_sequence_length"]
    if "max_sequence_length" in model.model_fields_set and model.max_sequence_length > longest:
        raise ConfigError(
            f"model.max_sequence_length={model.max_sequence_length} is longer than the {longest} of {source}.",
            f"use at most {longest}, or leave it out.",
        )


def _tokenizer(config: Config, folder: Path) -> str | None:
    """The folder's tokenizer, unless the tokens are made already."""
    path = folder / TOKENIZER_FILE
    if path.is_file():
        return str(path)
    if config.data.sources:
        raise ConfigError(
            f"{str(folder)!r} has no {TOKENIZER_FILE}.", "set data.tokenizer to the one of the model."
        )
    return None
