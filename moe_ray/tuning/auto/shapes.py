"""The models that AutoML chooses from: those of the configuration in other sizes, with other experts.

Of the configured model stay: what kind it is (preset, attention, router, vocabulary), its width over its depth,
and the width of the experts of a token over that of the model. What varies: the width, and with it blocks and
heads; `top_k` and shared experts, which divide the width of a token's experts among them (granularity); and how
many experts there are for each that a token takes.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_ray.config import Config, build_config
from moe_ray.errors import ConfigError
from moe_ray.model_config import ModelConfig
from moe_ray.tuning.auto.law import Points

TOP_K = (1, 2, 4, 8)
EXPERTS_PER_CHOICE = (2, 4, 8, 16)
SHARED = (0, 1)
_MOST_EXPERTS = 256
_SMALLEST_DIM = 32
_MULTIPLE = 8
# Of a run. Shorter ones learn little but how often each id comes, and no law of this form holds for them
# (docs/benchmarks.md).
_FEWEST_STEPS, _FEWEST_TOKENS_PER_ID = 100, 100
# Settings that follow from the chosen ones.
DERIVED = frozenset(
    {
        *("model.num_layers", "model.num_heads", "model.num_kv_heads", "model.expert_dim", "model.dense_dim"),
        *("optim.warmup_steps", "train.eval_every", "train.eval_batches", "checkpoint.every"),
    }
)


@dataclass(frozen=True)
class Shape:
    """One architecture: its settings, its cost, and its parameters, active ones and all."""

    settings: dict[str, Any]
    model: ModelConfig
    flops_per_token: int
    active: int
    total: int

    @property
    def experts_per_token(self) -> int:
        """Routed and shared ones."""
        return self.model.top_k + self.model.num_shared_experts

    @property
    def label(self) -> str:
        """As people speak of it."""
        model = self.model
        shared = f" and {model.num_shared_experts} shared" if model.num_shared_experts else ""
        layers = "1 layer" if model.num_layers == 1 else f"{model.num_layers} layers"
        return (
            f"{layers} of width {model.dim}, {model.top_k} of {model.num_experts} experts{shared} of width "
            f"{model.expert_dim}"
        )


@dataclass(frozen=True)
class Plan:
    """A run: an architecture and how it is trained."""

    shape: Shape
    lr: float
    batch: int
    steps: int


def shapes(config: Config, most_flops_per_token: float) -> list[Shape]:
    """All architectures up to a cost, the cheapest first; those that the other settings rule out are left out.

    The narrowest ones are among them whatever they cost.
    """
    found: list[Shape] = []
    for dim in _dims(config.model.dim):
        of_width = list(_of_width(config, dim))
        affordable = [shape for shape in of_width if shape.flops_per_token <= most_flops_per_token]
        if found and not affordable:
            break
        found += affordable if found else of_width
    return sorted(found, key=lambda shape: shape.flops_per_token)


def shape_of(config: Config, settings: dict[str, Any]) -> Shape:
    """The configured architecture, which has these settings."""
    model, flops = config.model, config.model.flops_per_token(config.data.sequence_length)
    return Shape(settings, model, flops, model.num_active_params(), model.num_params())


def batches(config: Config) -> list[int]:
    """Sequences a step that are tried: the configured ones and powers of two around them."""
    whole = config.parallel.max_workers
    sizes = (config.train.global_batch * factor for factor in (0.25, 0.5, 1, 2, 4))
    return sorted({max(1, round(size / whole)) * whole for size in sizes})


def steps_of(config: Config, shape: Shape, flops: float, batch: int) -> int:
    """Steps that so many FLOPs pay for; perhaps none."""
    return int(flops / (shape.flops_per_token * config.data.sequence_length * batch))


def fewest_steps(config: Config, batch: int) -> int:
    """Steps without which a run tells nothing."""
    tokens = _FEWEST_TOKENS_PER_ID * config.model.vocab_size
    return max(_FEWEST_STEPS, math.ceil(tokens / (batch * config.data.sequence_length)))


def most_flops_per_token(config: Config, flops: float) -> float:
    """Of models that can be trained long enough."""
    batch = min(batches(config))
    return flops / (fewest_steps(config, batch) * batch * config.data.sequence_length)


def run_values(config: Config, plan: Plan) -> dict[str, Any]:
    """Settings of a run: architecture, rate, batch, and what follows from its number of steps."""
    warmup = round(plan.steps * config.optim.warmup_steps / config.train.steps)
    evaluated = max(1, round(config.train.eval_batches * config.train.global_batch / plan.batch))
    return {
        **plan.shape.settings,
        "optim.lr": float(f"{plan.lr:.4g}"),
        "optim.warmup_steps": min(warmup, plan.steps // 2),
        "train.global_batch": plan.batch,
        "train.steps": plan.steps,
        "train.eval_batches": evaluated,
    }


def points_of(config: Config, plans: list[Plan]) -> Points:
    """What the law needs to know of runs."""
    batch_M = np.array([plan.batch * config.data.sequence_length for plan in plans], float)
    tokens_M = batch_M * [plan.steps for plan in plans]
    active_M = np.array([plan.shape.active for plan in plans], float)
    return Points(
        active=np.log(active_M),
        sparsity=np.log([plan.shape.total for plan in plans]) - np.log(active_M),
        granularity=np.log([plan.shape.experts_per_token for plan in plans]),
        shared=np.array([float(plan.shape.model.num_shared_experts > 0) for plan in plans]),
        tokens=np.log(tokens_M),
        flops=np.log(tokens_M * [plan.shape.flops_per_token for plan in plans]),
        lr=np.log([plan.lr for plan in plans]),
        batch=np.log(batch_M),
    )


def _dims(configured: int) -> Iterator[int]:
    """Multiples of 32, growing by a quarter of an octave at most, and the configured width."""
    dim = _SMALLEST_DIM
    found = {configured}
    while dim <= 2**15:
        found.add(dim)
        dim += max(_SMALLEST_DIM, 2 ** (dim.bit_length() - 3))
    yield from sorted(found)


def _of_width(config: Config, dim: int) -> Iterator[Shape]:
    for top_k in TOP_K:
        for ratio in EXPERTS_PER_CHOICE:
            for shared in SHARED:
                shape = _shape(config, dim, top_k, ratio * top_k, shared)
                if shape is not None:
                    yield shape


def _shape(config: Config, dim: int, top_k: int, experts: int, shared: int) -> Shape | None:
    base, scale = config.model, dim / config.model.dim
    heads = max(1, round(base.num_heads * scale))
    kv_heads = heads if base.attention == "mla" else _divisor(heads, base.num_kv_heads * scale)
    active = (base.top_k + base.num_shared_experts) * base.expert_dim * scale
    changes = {
        "dim": dim,
        "num_layers": max(1, base.num_dense_layers + 1, round(base.num_layers * scale)),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "num_experts": experts,
        "top_k": top_k,
        "num_shared_experts": shared,
        "expert_dim": _rounded(active / (top_k + shared)),
    }
    if base.num_dense_layers or base.moe_every > 1:
        changes["dense_dim"] = _rounded(base.dense_dim * scale)
    if experts > _MOST_EXPERTS:
        return None
    tree = config.model_dump(mode="json", exclude_unset=True, include={"model", "data", "parallel"})
    try:
        of = build_config({**tree, "model": tree.get("model", {}) | changes})
    except ConfigError:
        return None
    return shape_of(of, {f"model.{name}": value for name, value in changes.items()})


def _rounded(width: float) -> int:
    return max(_MULTIPLE, round(width / _MULTIPLE) * _MULTIPLE)


def _divisor(number: int, near: float) -> int:
    """The divisor that is nearest in ratio."""
    return min(
        (d for d in range(1, number + 1) if number % d == 0), key=lambda d: abs(math.log(d / max(near, 0.5)))
    )
