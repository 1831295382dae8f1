"""Which checkpoints of a run are kept: the newest, those at round steps, the best by a metric."""

from collections.abc import Mapping

from moe_ray.config import CheckpointConfig


def steps_to_keep(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> set[int]:
    """Steps whose checkpoints stay.

    Args:
        metrics: those of each checkpoint, by step. One without `checkpoint.best_metric` is never among the best.
    """
    steps = sorted(metrics)
    kept = set(steps[-config.keep_last :])
    if config.keep_every:
        kept |= {step for step in steps if step % config.keep_every == 0}
    if config.keep_best:
        sign = 1 if config.best_is == "lowest" else -1
        rated = [step for step in steps if config.best_metric in metrics[step]]
        # Of equally good ones the later: it has seen more tokens.
        kept |= set(sorted(rated, key=lambda s: (sign * metrics[s][config.best_metric], -s))[: config.keep_best])
    return kept
