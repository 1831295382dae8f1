"""Serve a checkpoint over HTTP:

serve run serve_apps.moe_lm:build checkpoint=RUN_OR_CHECKPOINT [serve.max_batch_size=8 …]
"""

import difflib

from ray.serve import Application

from moe_ray.checkpoint.catalog import resolve_checkpoint
from moe_ray.config import ServeConfig, build_config
from moe_ray.errors import ConfigError
from moe_ray.serving.deployment import make_application
from moe_ray.serving.engine.engine import check_causal

_KEYS = ["checkpoint", *(f"serve.{field}" for field in ServeConfig.model_fields)]


def build(args: dict[str, str]) -> Application:
    """The application of a checkpoint, or of the newest good one of a run, which all replicas then load.

    Args:
        args: `checkpoint`, and overrides of the run's `serve.*` settings.

    Raises:
        ConfigError: a key is unknown or a value not allowed.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    for key in args:
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown argument {key!r}.", f"did you mean {nearest!r}?")
    if not args.get("checkpoint"):
        raise ConfigError("the argument 'checkpoint' is missing.", "add checkpoint=RUN_OR_CHECKPOINT.")
    path, manifest = resolve_checkpoint(args["checkpoint"], frozenset({"model", "tokenizer"}))
    overrides = [f"{key}={value}" for key, value in args.items() if key != "checkpoint"]
    config = build_config(manifest.config, overrides)
    check_causal(config.model, config.serve.allow_expert_choice)
    return make_application(str(path), config.serve)
