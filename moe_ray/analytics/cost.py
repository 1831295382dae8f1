"""What a model costs and how fast it should be, next to dense models of its active and of its total size.

- FLOPs of a token: those of `ModelConfig.flops_per_token` (training, forward and backward), and forward alone: 2 a
  matmul parameter, and 2 * attended * heads * (key + value width) in each block. A prompt's token attends to half
  of the context on average, a generated one to all of it; windows bound both.
- Training memory of a rank: `parallel/plan.py`. Activations of a micro-batch are what the backward pass needs,
  after Korthikanti et al. 2022 without attention scores, which are computed again: by token and block the input of
  each norm, two normalised inputs, queries, keys, values and attention output; by routed copy its row, gate and up
  projection, hidden units and result; the logits and their gradient; in bfloat16 copies of all weights.
- Training step: `step_model.py`. A prompt is bound by FLOPs. A generated token reads all weights that it needs,
  of E experts those that a batch of b tokens meets, E * (1 - (1 - K / E)^b), and its keys and values.
- The dense model of equal active size has feed-forwards as wide as K experts and the shared ones together, that of
  equal total size as all experts together; it has no router.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moe_ray.analytics.cost_table import Communication, Cost, Measured, Memory, ModelCost, Profile, Speed
from moe_ray.analytics.profiles import DEVICES, Device, hardware, measure_this_machine
from moe_ray.analytics.step_model import Plan, step_seconds, transfers
from moe_ray.config import Config
from moe_ray.model_config import ModelConfig
from moe_ray.parallel.plan import plan_mesh
from moe_ray.section import Dtype

_BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2}
_FLOAT32 = 4


def run_cost(
    config: Config, metrics: Sequence[Mapping[str, Any]], devices: Sequence[Device] | None = None
) -> Cost:
    """Cost of a run's model on the world that it was last trained on, or `parallel.workers` says.

    Args:
        metrics: its logged steps; without any, nothing is compared.
        devices: to predict for; default: the published ones and this machine, which is measured.
    """
    last = metrics[-1] if metrics else {}
    world = last.get("world_size", config.parallel.min_workers)
    plan = plan_mesh(config, world, None)
    ep = last.get("ep", plan.ep)
    if devices is None:
        devices = (*DEVICES, measure_this_machine(config.train.dtype, world, _typical_gemm(config)))
    context = config.model.max_sequence_length
    models = tuple(
        _model_cost(name, config.model_copy(update={"model": model}), world, ep if name == "moe" else 1, devices)
        for name, model in (
            ("moe", config.model),
            ("dense, equal active size", dense_model(config.model, config.model.top_k)),
            ("dense, equal total size", dense_model(config.model, config.model.num_experts)),
        )
    )
    return Cost(
        dtype=config.train.dtype,
        world_size=world,
        ep=ep,
        context=context,
        sequence_length=config.data.sequence_length,
        batch=1,
        profiles=tuple(_profile(device, config.train.dtype) for device in devices),
        models=models,
        measured=_measured(metrics, models[0].speeds),
    )


def dense_model(model: ModelConfig, experts: int) -> ModelConfig:
    """The model whose MoE layers are dense ones as wide as so many experts and the shared ones.

    It is one hash-routed expert that every token takes: the same matrices as a dense feed-forward, and no router.
    """
    width = model.expert_dim * (experts + model.num_shared_experts)
    changes = {"num_experts": 1, "top_k": 1, "num_shared_experts": 0, "shared_expert_gate": False}
    return model.model_copy(update={**changes, "expert_dim": width, "router": "hash", "router_bias": False})


def forward_flops(model: ModelConfig, attended: float) -> float:
    """FLOPs of one token that attends to so many, in a forward pass."""
    width = model.num_heads * (model.qk_dim + model.v_dim)
    windows = (model.window(layer) or math.inf for layer in range(model.num_layers))
    return model.flops_per_token(0) / 3 + sum(2 * min(attended, window) * width for window in windows)


def activation_bytes(model: ModelConfig, tokens: int, dtype: Dtype) -> int:
    """What a micro-batch of so many tokens has stored when its backward pass begins, to a few percent."""
    gates = 2 if model.is_gated else 1
    num_moe = len(model.moe_layers)
    attention = (model.num_heads + model.num_kv_heads) * (model.qk_dim + model.v_dim)
    copies = model.top_k * (2 * model.dim + (gates + 1) * model.expert_dim)
    moe = copies + (gates + 1) * model.num_shared_experts * model.expert_dim
    dense = (gates + 1) * model.dense_dim
    numbers = model.num_layers * (2 * model.dim + attention) + num_moe * moe + (model.num_layers - num_moe) * dense
    # Norms work in float32, and under autocast they keep what they made of their input too.
    is_half = dtype == "bfloat16"
    floats = (4 if is_half else 2) * model.num_layers * model.dim + 2 * model.vocab_size
    weights = model.num_params() if is_half else 0
    return tokens * (_BYTES[dtype] * numbers + _FLOAT32 * floats) + _BYTES[dtype] * weights


def kv_cache_bytes(model: ModelConfig, dtype: Dtype) -> int:
    """Keys and values of one token, in all blocks."""
    return model.num_layers * model.num_kv_heads * (model.qk_dim + model.v_dim) * _BYTES[dtype]


def decode_bytes(model: ModelConfig, context: int, batch: int, dtype: Dtype) -> float:
    """What a step that generates one token in each of `batch` sequences reads: weights, keys and values."""
    met = 1 - (1 - model.top_k / model.num_experts) ** batch
    lookup = 0 if model.tie_embeddings else model.vocab_size * model.dim
    dense = model.num_params() - model.num_expert_params() - lookup
    weights = (dense + met * model.num_expert_params()) * _BYTES[dtype]
    return weights + batch * context * kv_cache_bytes(model, dtype)


def _model_cost(
    name: Literal["moe", "dense, equal active size", "dense, equal total size"],
    config: Config,
    world: int,
    ep: int,
    devices: Sequence[Device],
) -> ModelCost:
    model, dtype, context = config.model, config.train.dtype, config.model.max_sequence_length
    plan = _step_plan(config, world, ep)
    memory = _memory(config, world, ep)
    sent = transfers(plan)
    rows = len(model.moe_layers) * model.top_k * model.dim * _BYTES[dtype] * (ep - 1) / ep
    return ModelCost(
        name=name,
        params=model.num_params(),
        active_params=model.num_active_params(),
        training_flops=model.flops_per_token(config.data.sequence_length),
        prefill_flops=forward_flops(model, context / 2),
        decode_flops=forward_flops(model, context),
        memory=memory,
        communication=Communication(
            dispatch_forward=rows,
            combine_forward=rows,
            dispatch_backward=rows,
            combine_backward=rows,
            gradients_per_step=sent["dense"].sent + sent["experts"].sent,
        ),
        speeds=tuple(_speed(plan, device, context, memory) for device in devices),
    )


def _step_plan(config: Config, world: int, ep: int) -> Plan:
    train, parallel = config.train, config.parallel
    sequences = -(-train.global_batch // world)
    return Plan(
        config.model,
        world,
        ep,
        sequences,
        min(train.micro_batch, sequences),
        config.data.sequence_length,
        train.dtype,
        parallel.shard_dense,
        parallel.shard_experts,
    )


def _memory(config: Config, world: int, ep: int) -> Memory:
    fixed = config.parallel.model_copy(update={"ep": ep})
    plan = plan_mesh(config.model_copy(update={"parallel": fixed}), world, None)
    weights = plan.dense_bytes + plan.expert_bytes
    sequences = min(config.train.micro_batch, -(-config.train.global_batch // world))
    tokens = sequences * config.data.sequence_length
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=plan.state_bytes - 2 * weights,
        activations=activation_bytes(config.model, tokens, config.train.dtype),
        kv_cache_per_token=kv_cache_bytes(config.model, config.train.dtype),
    )


def _speed(plan: Plan, device: Device, context: int, memory: Memory) -> Speed:
    rates, model = hardware(device, plan.dtype), plan.model
    parts = step_seconds(plan, rates)
    useful = rates.peak_flops * rates.efficiency
    decode = {
        "compute": forward_flops(model, context) / useful,
        "memory": decode_bytes(model, context, 1, plan.dtype) / rates.memory_bandwidth,
    }
    return Speed(
        profile=device.name,
        training=plan.world * plan.tokens / sum(parts.values()),
        prefill=useful / forward_flops(model, context / 2),
        decode=1 / max(decode.values()),
        training_bound=max(parts, key=parts.__getitem__),
        prefill_bound="compute",
        decode_bound=max(decode, key=decode.__getitem__),
        fits=memory.weights + memory.gradients + memory.optimizer + memory.activations <= device.memory,
    )


def _profile(device: Device, dtype: Dtype) -> Profile:
    return Profile(
        name=device.name,
        flops=hardware(device, dtype).peak_flops,
        memory_bandwidth=device.memory_bandwidth,
        network_bandwidth=device.intra_bandwidth,
        memory=device.memory,
        efficiency=device.efficiency,
        source=device.source,
    )


def _measured(metrics: Sequence[Mapping[str, Any]], speeds: Sequence[Speed]) -> Measured | None:
    logged = [m["tokens_per_second"] for m in metrics if m.get("tokens_per_second")]
    if not logged:
        return None
    median = statistics.median(logged)
    return Measured(
        training=median, predicted_over_measured={speed.profile: speed.training / median for speed in speeds}
    )


def _typical_gemm(config: Config) -> tuple[int, int, int]:
    """Rows, inputs and outputs of an expert's first multiplication under balanced routing."""
    model = config.model
    tokens = config.train.micro_batch * config.data.sequence_length
    rows = max(1, tokens * model.top_k // model.num_experts)
    return rows, model.dim, (2 if model.is_gated else 1) * model.expert_dim
