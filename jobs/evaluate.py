"""Print the held-out perplexity of a checkpoint, or of the newest good one of a run.

usage: python jobs/evaluate.py RUN_OR_CHECKPOINT [section.field=value ...]

The settings are those of the run; `data.sources` or `data.path` may be overridden to evaluate on other text.
"""

import json
import sys

from jobs.cli import exit_on_error
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.checkpoint.save import TOKENIZER
from moe_ray.config import build_config
from moe_ray.data.prepare import prepare
from moe_ray.telemetry.logs import setup_logging
from moe_ray.training.held_out import evaluate_checkpoint


def main(run_or_checkpoint: str, overrides: list[str]) -> None:
    """Evaluate, print a few lines and, last, all numbers as one JSON object."""
    checkpoint = load_for_inference(run_or_checkpoint)
    config = build_config(checkpoint.config.model_dump(mode="json"), overrides)
    if config.data.sources != checkpoint.config.data.sources:
        # Other text must be cut into the tokens that the model knows.
        tokenizer = f"data.tokenizer={checkpoint.path / TOKENIZER}"
        config = build_config(config.model_dump(mode="json"), [tokenizer])
    setup_logging(config.telemetry.log_level)
    result = evaluate_checkpoint(checkpoint, prepare(config))
    print(f"checkpoint {checkpoint.path}, step {result['step']}, {result['tokens']:,} held-out tokens")
    print(f"perplexity {result['val_perplexity']:.1f}, unigram model {result['unigram_perplexity']:.1f}")
    for domain, perplexity in result["val_perplexity_by_domain"].items():
        print(f"  {domain:<16} {perplexity:.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    exit_on_error(lambda: main(sys.argv[1], sys.argv[2:]))
