"""Print the held-out perplexity of a checkpoint, of the newest good one of a run, or of a Hugging Face folder.

usage: python jobs/evaluate.py RUN_OR_CHECKPOINT_OR_FOLDER [data.sources=...] [data.path=...] [data.FIELD=...]
           [serve.quantize=int8|int4]

Without overrides, on the validation split of the run. With `data.sources`, on that of other text, cut into the
model's own tokens; with `data.path` alone, on data that was prepared with them. A Hugging Face folder has no run,
so that one of the two is needed. Longer windows (`data.sequence_length`) give lower perplexities. With
`serve.quantize` the experts have weights of 8 or 4 bits, as in an endpoint.
"""

import json
import sys
from pathlib import Path

from jobs.cli import exit_on_error
from moe_ray.checkpoint.inference import InferenceModel, load_for_inference
from moe_ray.checkpoint.manifest import TOKENIZER
from moe_ray.config import Config, build_config
from moe_ray.cpu import keep_freed_memory
from moe_ray.data.prepare import prepare
from moe_ray.data.shards import read_index
from moe_ray.data.tokenizer import load_tokenizer
from moe_ray.errors import ConfigError, DataError
from moe_ray.telemetry.logs import setup_logging
from moe_ray.training.held_out import evaluate_checkpoint

_OTHER_TEXT = frozenset({"data.sources", "data.path", "data.text_field", "data.validation_fraction"})
_QUANTIZE = "serve.quantize"
_ALLOWED = (*sorted(_OTHER_TEXT), "data.sequence_length", _QUANTIZE)


def main(run_or_checkpoint: str, overrides: list[str]) -> None:
    """Evaluate, print a few lines and, last, all numbers as one JSON object."""
    given = {override.partition("=")[0].strip() for override in overrides}
    for key in sorted(given - set(_ALLOWED)):
        raise ConfigError(f"{key!r} cannot be set to evaluate.", f"use {', '.join(_ALLOWED)}.")
    keep_freed_memory()
    chosen = [override for override in overrides if override.partition("=")[0].strip() == _QUANTIZE]
    quantize = build_config({}, chosen).serve.quantize
    checkpoint = load_for_inference(run_or_checkpoint, quantize=quantize)
    is_other_text = bool(given & _OTHER_TEXT)
    if not checkpoint.data_digest and not is_other_text:
        raise ConfigError(
            f"{run_or_checkpoint!r} has no run whose held-out text it could be.", "set data.sources."
        )
    setup_logging(checkpoint.config.telemetry)
    config = _data_settings(checkpoint, overrides, given)
    data_dir = prepare(config)
    _check_data(checkpoint, data_dir, other_text=is_other_text)
    length = config.data.sequence_length
    result = evaluate_checkpoint(checkpoint, data_dir, length)
    print(f"checkpoint {checkpoint.path}, step {result['step']}, {result['tokens']:,} held-out tokens", end=", ")
    print(f"in windows of {length}, {config.train.dtype}, quantize={quantize}")
    print(f"perplexity {result['val_perplexity']:.1f}, unigram model {result['unigram_perplexity']:.1f}")
    for domain, perplexity in result["val_perplexity_by_domain"].items():
        print(f"  {domain:<16} {perplexity:.1f}")
    print(json.dumps(result))


def _data_settings(checkpoint: InferenceModel, overrides: list[str], given: set[str]) -> Config:
    """Settings that never make the run's own prepared data anew."""
    tree = checkpoint.config.model_dump(mode="json")
    if "data.sources" in given:
        # Other text must be cut into the tokens that the model knows.
        tree["data"] |= {"path": None, "tokenizer": str(checkpoint.path / TOKENIZER)}
    elif "data.path" in given or tree["data"]["path"] is not None:
        tree["data"]["sources"] = []
        if "data.path" in given:
            tree["data"]["path"] = "given"
    return build_config(tree, overrides)


def _check_data(checkpoint: InferenceModel, data_dir: Path, *, other_text: bool) -> None:
    if other_text:
        if load_tokenizer(data_dir / TOKENIZER).digest != checkpoint.tokenizer.digest:
            raise DataError(
                f"the data in {str(data_dir)!r} was prepared with another tokenizer.",
                f"prepare it with data.tokenizer={checkpoint.path / TOKENIZER}.",
            )
    elif read_index(data_dir).digest != checkpoint.data_digest:
        raise DataError(
            f"the data in {str(data_dir)!r} is not what the run was trained on; its sources have changed.",
            "restore them, or evaluate on other text with data.sources.",
        )


if __name__ == "__main__":
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    exit_on_error(lambda: main(sys.argv[1], sys.argv[2:]))
