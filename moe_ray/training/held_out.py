"""Held-out perplexity: during training, and of a finished checkpoint."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.data.batches import MicroBatch, micro_batches, unigram_perplexity, validation_batches
from moe_ray.data.reader import TokenData, open_data
from moe_ray.parallel.mesh import Mesh
from moe_ray.training.step import evaluate


def held_out_batches(
    data: TokenData, mesh: Mesh, global_batch: int, num_batches: int, micro_batch: int
) -> Iterator[MicroBatch]:
    """This rank's share of an evaluation over `num_batches` global batches, spread evenly over the split."""
    for numbers_G in validation_batches(data.num_sequences("validation"), global_batch, num_batches):
        yield from micro_batches(data, "validation", numbers_G, mesh.rank, mesh.world_size, micro_batch)


def validation_metrics(sums_2M: Tensor, domains: Sequence[str]) -> dict[str, Any]:
    """Loss in nats and perplexity, over all and by domain, from what `training.step.evaluate` returns."""
    loss = (sums_2M[0].sum() / sums_2M[1].sum()).item()
    by_domain = {
        domain: math.exp(min(nats / count, 700.0))
        for domain, (nats, count) in zip(domains, sums_2M.T.tolist(), strict=True)
        if count
    }
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700.0)),
        "val_perplexity_by_domain": by_domain,
    }


def evaluate_checkpoint(
    checkpoint: InferenceModel, data_dir: Path, sequence_length: int | None = None
) -> dict[str, Any]:
    """Perplexity of a checkpoint over the whole validation split, next to that of a unigram model.

    Args:
        sequence_length: tokens of the windows that are predicted; default: those of its training.
    """
    config = checkpoint.config
    data = open_data(data_dir, sequence_length or config.data.sequence_length)
    mesh = Mesh(rank=0, world_size=1, ep=1, device=torch.device("cpu"))
    batches = held_out_batches(
        data, mesh, config.train.micro_batch, data.num_sequences("validation"), config.train.micro_batch
    )
    sums_2M = evaluate(checkpoint.model, mesh, config.train.dtype, batches, len(data.domains))
    metrics = validation_metrics(sums_2M, data.domains)
    unigram = unigram_perplexity(data)
    return {
        "step": checkpoint.step,
        "tokens": int(sums_2M[1].sum()),
        **metrics,
        "unigram_perplexity": unigram,
        "unigram_ratio": unigram / metrics["val_perplexity"],
    }
