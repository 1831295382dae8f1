"""How much memory the training state of a rank really takes, for comparison with `parallel/plan.py`."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of this rank's parameters, gradients and optimizer state, with all padding; each storage counts once.

    Buffers are left out. Call it between the backward pass and `zero_grad`, or gradients are missing.
    """
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return _storage_bytes([*parameters, *gradients, *states])


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(Tensor.untyped_storage, local)}
    return sum(storages.values())
