"""Open a checkpoint to evaluate or serve it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moe_ray.checkpoint.catalog import resolve_checkpoint
from moe_ray.checkpoint.load import load_model
from moe_ray.checkpoint.save import TOKENIZER
from moe_ray.config import Config, Dtype, build_config
from moe_ray.data.tokenizer import Tokenizer, load_tokenizer
from moe_ray.models.router import TopKRouter
from moe_ray.models.transformer import Transformer, materialize


@dataclass(frozen=True)
class InferenceModel:
    """A model that is ready to generate.

    Attributes:
        model: in evaluation mode, all experts on one device.
        tokenizer: the one it was trained with.
        config: the settings of its run.
        step: optimizer steps it was trained for.
        data_digest: identity of the tokens it was trained on.
        path: the checkpoint directory.
    """

    model: Transformer
    tokenizer: Tokenizer
    config: Config
    step: int
    data_digest: str
    path: Path

    @property
    def name(self) -> str:
        """Name of the run, which is the model's name in the API."""
        return self.config.train.name


def load_for_inference(
    run_or_checkpoint: str | Path, dtype: Dtype = "float32", device: torch.device | str = "cpu"
) -> InferenceModel:
    """Load a checkpoint, or the newest good one of a run, without its optimizer state.

    Routers stay in float32 whatever `dtype`: rounding them would route differently than training did.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path, manifest = resolve_checkpoint(run_or_checkpoint, frozenset({"model", "tokenizer"}))
    config = build_config(manifest.config)
    with torch.device("meta"):
        model = Transformer(config.model)
    for module in model.modules():
        if not isinstance(module, TopKRouter):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(getattr(torch, dtype))
    materialize(model, device)
    load_model(path, manifest, model)
    model.requires_grad_(False)
    return InferenceModel(
        model.eval(), load_tokenizer(path / TOKENIZER), config, manifest.step, manifest.data_digest, path
    )
