"""Serve a checkpoint, or a model in a Hugging Face folder, over HTTP.

usage: serve run serve_apps.moe_lm:build checkpoint=RUN_OR_CHECKPOINT_OR_FOLDER [serve.max_batch_size=8 …]
"""

import difflib

import click
from ray.serve import Application

from moe_ray.checkpoint.catalog import list_steps
from moe_ray.checkpoint.inference import check_expert_budget, resolve_source
from moe_ray.config import TelemetryConfig, build_config
from moe_ray.errors import ConfigError, UserError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.api_keys import load_keys
from moe_ray.serving.deployment import make_application
from moe_ray.serving.engine.engine import check_faithful
from moe_ray.serving.vllm_folder import check_vllm
from moe_ray.storage import open_storage

_LOG_KEYS = [f"telemetry.{field}" for field in TelemetryConfig.model_fields if field.startswith("log_")]
_KEYS = ["checkpoint", *(f"serve.{field}" for field in ServeConfig.model_fields), *_LOG_KEYS]


class _Told(click.ClickException):
    """An error of which `serve run` prints the line alone."""

    exit_code = UserError.exit_code


def build(args: dict[str, str]) -> Application:
    """The application of a checkpoint, or of the newest good one of a run, which all replicas then load.

    Args:
        args: `checkpoint`, and overrides of the run's `serve.*` and `telemetry.log_*` settings.

    Raises:
        ConfigError: a key is unknown or a value not allowed.
        CheckpointError: there is no such checkpoint, or it is damaged.
    """
    try:
        return _build(args)
    except UserError as error:
        context = click.get_current_context(silent=True)
        if context is None or context.command_path != "serve run":
            raise
        raise _Told(str(error)) from error


def _build(args: dict[str, str]) -> Application:
    for key in args:
        if key.endswith("port"):
            raise ConfigError(
                f"unknown argument {key!r}.", "set the port in a config file such as serve_apps/moe_lm.yaml."
            )
        if key not in _KEYS:
            nearest = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown argument {key!r}.", f"did you mean {nearest!r}?")
    if not args.get("checkpoint"):
        raise ConfigError("the argument 'checkpoint' is missing.", "add checkpoint=RUN_OR_CHECKPOINT.")
    path, settings = resolve_source(args["checkpoint"])
    overrides = [f"{key}={value}" for key, value in args.items() if key != "checkpoint"]
    config = build_config(settings.model_dump(mode="json"), overrides)
    check_faithful(config.model, config.serve.allow_unfaithful_routing)
    if config.serve.engine == "vllm":
        check_vllm(config.serve, config.model)
    # Told here in one line; a replica would be started again and again.
    load_keys(config.serve.api_keys_file)
    if config.serve.expert_memory_bytes is not None:
        check_expert_budget(path, config.serve.dtype, config.serve.quantize, config.serve.expert_memory_bytes)
    if not config.serve.follow:
        return make_application(str(path), config.serve, config.telemetry)
    run = open_storage(args["checkpoint"])
    if not list_steps(run):
        raise ConfigError(
            f"serve.follow=true needs a run, and {args['checkpoint']!r} is none.", "set checkpoint=RUN."
        )
    return make_application(run.uri, config.serve, config.telemetry)
