"""Write a model as a Hugging Face folder, which transformers and vLLM load.

usage: python jobs/export.py RUN_OR_CHECKPOINT_OR_FOLDER OUT_DIR [dtype=float32|bfloat16] [max_shard_bytes=N]

OUT_DIR must not exist; it appears whole or not at all. Without `dtype`, weights are written as they are stored: in
float32 from a run, and unchanged from a Hugging Face folder.
"""

import sys
from pathlib import Path

import torch

from jobs.cli import exit_on_error
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.errors import ConfigError
from moe_ray.models.hf.save import MAX_SHARD_BYTES, check_free, save_folder
from moe_ray.models.hf.sidecars import TOKENIZER_FILE, complete_sidecars, read_sidecars

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(source: str, out: str, options: list[str]) -> None:
    """Export and print what was written."""
    dtype, max_shard_bytes = _parse(options)
    folder = Path(out).expanduser().resolve()
    check_free(folder)
    loaded = load_for_inference(source, dtype=None)
    tokenizer_json = (loaded.path / TOKENIZER_FILE).read_bytes()
    sidecars = complete_sidecars(
        read_sidecars(loaded.path),
        tokenizer_json,
        loaded.tokenizer.eos_id,
        loaded.model.config.max_sequence_length,
    )
    architecture = save_folder(
        loaded.model,
        folder,
        tokenizer_json=tokenizer_json,
        sidecars=sidecars,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )
    print(f"{loaded.path}, step {loaded.step}, as {architecture.model_class}")
    print(folder)


def _parse(options: list[str]) -> tuple[torch.dtype | None, int]:
    given = dict(option.partition("=")[::2] for option in options)
    dtype, max_shard_bytes = given.pop("dtype", None), given.pop("max_shard_bytes", str(MAX_SHARD_BYTES))
    if given:
        raise ConfigError(f"unknown option {next(iter(given))!r}.", "use dtype or max_shard_bytes.")
    if dtype is not None and dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not allowed.", f"use one of {', '.join(_DTYPES)}.")
    if not max_shard_bytes.isdecimal() or int(max_shard_bytes) == 0:
        raise ConfigError(
            f"max_shard_bytes={max_shard_bytes!r} is no positive number.", "give bytes, such as 5000000000."
        )
    return None if dtype is None else _DTYPES[dtype], int(max_shard_bytes)


if __name__ == "__main__":
    if len(sys.argv) < 3 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)
    exit_on_error(lambda: main(sys.argv[1], sys.argv[2], sys.argv[3:]))
