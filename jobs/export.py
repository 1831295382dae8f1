"""Write a model as a Hugging Face folder, which transformers and vLLM load.

usage: python jobs/export.py RUN_OR_CHECKPOINT_OR_FOLDER OUT_DIR [dtype=float32|bfloat16] [quantize=int8|int4]
           [max_shard_bytes=N]

OUT_DIR must not exist; it appears whole or not at all. Without `dtype`, weights are written as they are stored: in
float32 from a run, and unchanged from a Hugging Face folder. With `quantize` the experts have the weights that
`serve.quantize` gives them at each start; only moe_ray reads those.
"""

import sys
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch

from jobs.cli import exit_on_error
from moe_ray.checkpoint.export import export_folder
from moe_ray.checkpoint.inference import load_for_inference, stored_scheme
from moe_ray.config import TelemetryConfig
from moe_ray.errors import ConfigError
from moe_ray.models.hf.save import MAX_SHARD_BYTES, check_free
from moe_ray.models.quantize import Scheme
from moe_ray.section import Dtype, Quantize
from moe_ray.submission import lasting
from moe_ray.telemetry.logs import setup_logging


@dataclass(frozen=True)
class _Options:
    dtype: Dtype | None = None
    quantize: Quantize = "none"
    max_shard_bytes: int = MAX_SHARD_BYTES


def main(source: str, out: str, options: list[str]) -> None:
    """Export and print what was written."""
    chosen = _parse(options)
    setup_logging(TelemetryConfig())
    folder = lasting("OUT_DIR", out)
    check_free(folder)
    _check_not_quantized(source)
    # Quantized, experts come from weights that are rounded already, as in an endpoint.
    dtype = chosen.dtype if chosen.quantize != "none" else None
    loaded = load_for_inference(source, dtype, quantize=chosen.quantize)
    written_as = getattr(torch, chosen.dtype) if chosen.dtype and chosen.quantize == "none" else None
    architecture = export_folder(loaded, folder, dtype=written_as, max_shard_bytes=chosen.max_shard_bytes)
    kind = "" if chosen.quantize == "none" else f", experts in {chosen.quantize}"
    print(f"{loaded.path}, step {loaded.step}, as {architecture.model_class}{kind}")
    print(folder)


def _check_not_quantized(source: str) -> None:
    scheme = stored_scheme(source)
    if scheme != "none":
        raise ConfigError(f"{source!r} has experts in {scheme} already.", "export the model that it was made of.")


def _parse(options: list[str]) -> _Options:
    given = dict(option.partition("=")[::2] for option in options)
    dtype, quantize = given.pop("dtype", None), given.pop("quantize", "none")
    max_shard_bytes = given.pop("max_shard_bytes", str(MAX_SHARD_BYTES))
    if given:
        raise ConfigError(f"unknown option {next(iter(given))!r}.", "use dtype, quantize or max_shard_bytes.")
    _check_one_of("dtype", dtype, (None, *get_args(Dtype)))
    _check_one_of("quantize", quantize, ("none", *get_args(Scheme)))
    if not max_shard_bytes.isdecimal() or int(max_shard_bytes) == 0:
        raise ConfigError(
            f"max_shard_bytes={max_shard_bytes!r} is no positive number.", "give bytes, such as 5000000000."
        )
    return _Options(cast(Any, dtype), cast(Any, quantize), int(max_shard_bytes))


def _check_one_of(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(choice for choice in allowed if choice is not None)
        raise ConfigError(f"{name}={value!r} is not allowed.", f"use one of {choices}.")


if __name__ == "__main__":
    if len(sys.argv) < 3 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)
    exit_on_error(lambda: main(sys.argv[1], sys.argv[2], sys.argv[3:]))
