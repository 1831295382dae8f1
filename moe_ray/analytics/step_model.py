"""What a training step and its messages cost, as formulae.

Symbols: n ranks, p of them an ep group, n/p copies of each expert; T tokens a rank and step, K experts a
token, D model dim, b bytes of an activation, L MoE layers, E experts, A micro-batches; P_d parameters that are
no experts, P_e of experts.

- FLOPs: `ModelConfig.flops_per_token` (Chowdhery et al. 2022, PaLM, appendix B, active parameters). Seconds
  are FLOPs over peak times efficiency.
- AdamW reads parameter, gradient and two moments and writes three of them: 28 bytes a parameter, at memory
  speed.
- Dispatch and combine: 4 L T K D b (p - 1)/p bytes leave a rank under balanced routing: twice forward, twice
  backward (Lepikhin et al. 2020, GShard); and the counts, 8 L A E (p - 1)/p.
- All-reduce of x bytes over g ranks: 2 x (g - 1)/g leave each (Patarasuk and Yuan 2009, ring), 2 log2(g)
  latencies (Thakur et al. 2005). Gradients are float32: P_d over n ranks, P_e/p over n/p.
- Sharded parameters (Rajbhandari et al. 2020, ZeRO, stage 3): gathered forward and backward, gradients
  scattered, in each micro-batch: 3 A x (g - 1)/g instead.
- Groups larger than a node: peers on other nodes are reached over the network, at the same time as those on
  the own over the node's links; the slower decides. Nothing overlaps with computation, as in the code.
"""

import math
from dataclasses import dataclass

from moe_ray.analytics.routing import num_columns
from moe_ray.model_config import ModelConfig
from moe_ray.section import Dtype

_ADAMW_BYTES = 28


@dataclass(frozen=True)
class Hardware:
    """One rank's device and what connects it; FLOP/s, bytes/s a rank and direction, seconds.

    Attributes:
        efficiency: share of `peak_flops` that the whole model reaches without communication.
        copy_bandwidth: device to host.
        storage_bandwidth: of a node.
    """

    peak_flops: float
    efficiency: float
    memory_bandwidth: float
    ranks_per_node: int
    intra_bandwidth: float
    inter_bandwidth: float
    latency: float
    copy_bandwidth: float
    storage_bandwidth: float


@dataclass(frozen=True)
class Plan:
    """A model on `world` ranks; `sequences` are those of one rank and step."""

    model: ModelConfig
    world: int
    ep: int
    sequences: int
    micro_batch: int
    sequence_length: int
    dtype: Dtype = "bfloat16"
    shard_dense: bool = False
    shard_experts: bool = False

    @property
    def tokens(self) -> int:
        """Of one rank and step."""
        return self.sequences * self.sequence_length

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return -(-self.sequences // self.micro_batch)

    @property
    def expert_params(self) -> int:
        """Parameters of all experts."""
        return self.model.num_expert_params()

    @property
    def dense_params(self) -> int:
        """All other parameters."""
        return self.model.num_params() - self.expert_params


@dataclass(frozen=True)
class Transfer:
    """Bytes that leave a rank in a step, to the `group - 1` peers that are `stride` ranks apart."""

    sent: float
    group: int
    stride: int
    messages: float

    def seconds(self, hardware: Hardware) -> float:
        """Time on the links; peers on the own node and on others at the same time."""
        if self.group == 1:
            return 0.0
        near = max(1, min(self.group, hardware.ranks_per_node // self.stride))
        far = (self.group - near) / (self.group - 1)
        intra, inter = self.sent * (1 - far) / hardware.intra_bandwidth, self.sent * far / hardware.inter_bandwidth
        return max(intra, inter) + self.messages * hardware.latency

    def ring_seconds(self, hardware: Hardware) -> float:
        """The same for a ring, all of whose traffic crosses its slowest link."""
        if self.group == 1:
            return 0.0
        inside = self.group * self.stride <= hardware.ranks_per_node
        bandwidth = hardware.intra_bandwidth if inside else hardware.inter_bandwidth
        return self.sent / bandwidth + self.messages * hardware.latency


def transfers(plan: Plan) -> dict[str, Transfer]:
    """What each rank sends in a step, under balanced routing."""
    model, n, ep, dp = plan.model, plan.world, plan.ep, plan.world // plan.ep
    layers, activation = len(model.moe_layers), 2 if plan.dtype == "bfloat16" else 4
    away = (ep - 1) / ep
    rows = 4 * layers * plan.tokens * model.top_k * model.dim * activation * away
    counts = 8 * layers * plan.accumulation * model.num_experts * away
    statistics = 8 * (1 + layers * num_columns(model.num_experts))
    return {
        "dispatch": Transfer(rows + counts, ep, 1, 5 * layers * plan.accumulation * (ep - 1)),
        "dense": _gradients(4 * plan.dense_params, n, 1, plan.shard_dense, plan.accumulation),
        "experts": _gradients(4 * plan.expert_params / ep, dp, ep, plan.shard_experts, plan.accumulation),
        "statistics": _gradients(statistics, n, 1, False, 1),
        "norm": _gradients(4, ep, 1, False, 1),
    }


def _gradients(num_bytes: float, group: int, stride: int, is_sharded: bool, accumulation: int) -> Transfer:
    times = 3 * accumulation if is_sharded else 2
    return Transfer(times * num_bytes * (group - 1) / group, group, stride, times * math.log2(group))


def step_seconds(plan: Plan, hardware: Hardware) -> dict[str, float]:
    """Seconds of the parts of a step, which follow each other."""
    flops = plan.tokens * plan.model.flops_per_token(plan.sequence_length)
    sent = transfers(plan)
    dense = plan.dense_params / (plan.world if plan.shard_dense else 1)
    experts = plan.expert_params / (plan.world if plan.shard_experts else plan.ep)
    return {
        "compute": flops / (hardware.peak_flops * hardware.efficiency),
        "optimizer": _ADAMW_BYTES * (dense + experts) / hardware.memory_bandwidth,
        "dispatch": sent["dispatch"].seconds(hardware),
        "reduce": sum(sent[name].ring_seconds(hardware) for name in ("dense", "experts", "statistics", "norm")),
    }
