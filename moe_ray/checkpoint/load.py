"""Read a checkpoint into a model and optimizer of any world size and `ep`; each rank reads only its share."""

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from moe_ray.checkpoint.manifest import FileEntry, Manifest
from moe_ray.checkpoint.state import first_local_expert
from moe_ray.errors import CheckpointError
from moe_ray.models.transformer import Transformer


@torch.no_grad()
def load_model(checkpoint: Path, manifest: Manifest, model: Transformer) -> None:
    """Copy the weights and buffers of a verified checkpoint into `model`.

    Raises:
        CheckpointError: the checkpoint is of another architecture.
    """
    reader = _Reader(checkpoint, manifest, "model", model)
    for name, tensor in model.state_dict().items():
        stored = reader.read(name)
        if stored.shape != tensor.shape:
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} has {name} of shape {tuple(stored.shape)} "
                f"where the model has {tuple(tensor.shape)}.",
                "use the model settings that the run was started with.",
            )
        tensor.copy_(stored)


def load_optimizer(
    checkpoint: Path, manifest: Manifest, model: Transformer, optimizer: torch.optim.Optimizer
) -> None:
    """Set the optimizer state of every parameter of `model` from a verified checkpoint."""
    reader = _Reader(checkpoint, manifest, "optimizer", model)
    keys = defaultdict(list)
    for name in reader.names():
        parameter, _, key = name.rpartition(".")
        keys[parameter].append(key)
    for name, parameter in model.named_parameters():
        state = {key: reader.read(f"{name}.{key}").to(parameter.device) for key in keys[name]}
        optimizer.state[parameter] = state


class _Reader:
    """Named tensors of one kind of file, those of experts cut to the ones that the model holds."""

    def __init__(
        self, checkpoint: Path, manifest: Manifest, kind: Literal["model", "optimizer"], model: Transformer
    ) -> None:
        self._checkpoint = checkpoint
        self._first, self._count = first_local_expert(model)
        self._sources: dict[str, list[tuple[FileEntry, Any]]] = defaultdict(list)
        for entry in sorted(manifest.files, key=lambda entry: entry.first_expert or 0):
            if entry.kind == kind:
                file = safe_open(checkpoint / entry.name, framework="pt")
                for name in file.keys():  # noqa: SIM118
                    self._sources[name].append((entry, file))

    def names(self) -> list[str]:
        return list(self._sources)

    def read(self, name: str) -> Tensor:
        parts, num_experts = [], 0
        for entry, file in self._sources.get(name, []):
            if entry.first_expert is None:
                return file.get_tensor(name)
            low = max(self._first, entry.first_expert) - entry.first_expert
            high = min(self._first + self._count, entry.first_expert + entry.num_experts) - entry.first_expert
            if low < high:
                parts.append(file.get_slice(name)[low:high])
                num_experts += high - low
        if not parts or num_experts != self._count:
            raise CheckpointError(
                f"checkpoint {str(self._checkpoint)!r} lacks {name} "
                f"for experts {self._first} to {self._first + self._count - 1}.",
                "use the model settings that the run was started with.",
            )
        return torch.cat(parts)
