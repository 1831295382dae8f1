"""What the failures of a training run cost, as formulae; those of its steps are `moe_ray.analytics.step_model`.

- Checkpoint: 12 bytes a parameter. It stops training for the copy to host memory, or for the write as well.
- Interval: sqrt(2 s M), s seconds that a checkpoint stops training, M mean time between failures of the whole
  (Young 1974; Daly 2006, first order), but not shorter than a write or a step takes.
- Goodput: 1 - s/interval - lost/M, at least 0, where a failure loses half an interval, detection, restart and
  load, and static training the wait for another node. Elastic training instead goes on with m - 1 of m nodes,
  which loses wait/m, and restarts once more, on a checkpoint, to grow; it waits too where that loses less.
"""

import math
from dataclasses import dataclass

from moe_ray.analytics.step_model import Hardware, Plan

_STATE_BYTES = 12


@dataclass(frozen=True)
class Faults:
    """How often nodes fail and how long what follows takes; hours and seconds."""

    node_mtbf_hours: float
    detect_seconds: float
    restart_seconds: float
    replace_seconds: float


@dataclass(frozen=True)
class Checkpointing:
    """Seconds that a checkpoint stops training, that its write takes, and that a load takes."""

    stall: float
    write: float
    load: float


@dataclass(frozen=True)
class Outlook:
    """Checkpoint interval in seconds, and shares of the time that advance training."""

    interval: float
    static: float
    elastic: float


def checkpointing(plan: Plan, hardware: Hardware, asynchronous: bool) -> Checkpointing:
    """Every part of the state is written once, by all nodes together; each node reads what its ranks hold."""
    nodes = math.ceil(plan.world / hardware.ranks_per_node)
    on_node = min(plan.world, hardware.ranks_per_node)
    dense = plan.dense_params / (plan.world if plan.shard_dense else 1)
    experts = plan.expert_params / (plan.world if plan.shard_experts else plan.ep)
    copy = _STATE_BYTES * (dense + experts) / hardware.copy_bandwidth
    write = _STATE_BYTES * plan.model.num_params() / (nodes * hardware.storage_bandwidth)
    held = min(plan.dense_params, dense * on_node) + min(plan.expert_params, experts * on_node)
    load = _STATE_BYTES * held / hardware.storage_bandwidth
    return Checkpointing(copy if asynchronous else copy + write, write, load)


def outlook(checkpoint: Checkpointing, faults: Faults, nodes: int, step: float = 0.0) -> Outlook:
    """Goodput of `nodes` nodes that take `step` seconds a step, at the best interval."""
    if math.isinf(faults.node_mtbf_hours):
        return Outlook(math.inf, 1.0, 1.0)
    mtbf = faults.node_mtbf_hours * 3600 / nodes
    interval = max(math.sqrt(2 * checkpoint.stall * mtbf), checkpoint.write, step)
    restart = faults.restart_seconds + checkpoint.load
    always = interval / 2 + faults.detect_seconds + restart
    wait = faults.replace_seconds
    shrink = wait / nodes + restart if nodes > 1 else wait
    static, elastic = (
        max(0.0, 1 - checkpoint.stall / interval - (always + more) / mtbf) for more in (wait, min(wait, shrink))
    )
    return Outlook(interval, static, elastic)
