"""Sparse upcycling (Komatsuzaki et al. 2022): a dense model becomes a Mixture-of-Experts of the same function.

Every expert starts as a copy of the feed-forward that it replaces, so whichever a token is routed to, routing
weights that sum to 1 give back the dense output.
"""

from pathlib import Path

import torch

from moe_ray.models.hf.architectures import DENSE_ARCHITECTURES
from moe_ray.models.hf.load import load_weights, open_folder
from moe_ray.models.hf.tensors import pieces
from moe_ray.models.seeding import seeded_generator
from moe_ray.models.transformer import Transformer


def load_start(model: Transformer, seed: int) -> None:
    """Replace initial weights by those of `model.init_from` or `model.upcycle_from`, if one is set.

    Args:
        model: initialised, with this rank's share of the experts.
        seed: of the noise on upcycled experts.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the model.
    """
    if model.config.init_from is not None:
        load_weights(open_folder(Path(model.config.init_from), model), model)
    elif model.config.upcycle_from is not None:
        _upcycle(Path(model.config.upcycle_from), model, seed)


@torch.no_grad()
def _upcycle(folder: Path, model: Transformer, seed: int) -> None:
    """Copy a dense model; routers keep their initial weights."""
    dense = open_folder(folder, model, DENSE_ARCHITECTURES)
    for piece in pieces(model, dense.architecture):
        stored = dense.files.read(piece.name)
        piece.load(stored)
        if piece.expert is not None and model.config.upcycle_noise:
            generator = seeded_generator(f"{seed}/upcycle/{piece.name}/{piece.expert}")
            std = model.config.upcycle_noise * stored.float().std().item()
            noise = torch.empty(piece.view.shape).normal_(0.0, std, generator=generator)
            piece.view.add_(noise.to(piece.view))
