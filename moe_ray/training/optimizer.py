"""AdamW with decay on matrices only, its learning-rate schedule, and what moves with each of its steps."""

import math
from collections import defaultdict

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from moe_ray.config import OptimConfig
from moe_ray.models.top_k_router import TopKRouter
from moe_ray.models.transformer import Transformer


def build_optimizer(model: Transformer, optim: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov and Hutter 2019); norms, biases and sinks are not decayed.

    Before each of its steps the expert biases move by the load in `load_fraction_E`, which is that of the global
    batch (Wang et al. 2024): summed over the world and over accumulation, so that all ranks agree.
    """
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.rpartition(".")[2].startswith("b_")
        # A fused kernel takes only tensors that are sharded over the same ranks.
        axis = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups[is_matrix, axis].append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": optim.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), parameters in groups.items()
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    routers = [moe.router for moe in model.moe_modules() if isinstance(moe.router, TopKRouter)]

    def update_expert_biases(*_: object) -> None:
        for router in routers:
            router.update_expert_bias(router.load_fraction_E)

    if any(router.expert_bias_E is not None for router in routers):
        optimizer.register_step_pre_hook(update_expert_biases)
    return optimizer


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Rate of the update that follows `step` finished ones: linear warm-up, then cosine to `min_lr_ratio`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * cosine)
