"""Which fault strikes at which step: a function of the seed and the options alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from moe_ray.config import Config
from moe_ray.errors import ConfigError


class Fault(StrEnum):
    """What can happen to a run."""

    KILL_WORKER = "kill_worker"
    STOP_WORKER = "stop_worker"
    TERM_WORKER = "term_worker"
    KILL_DRIVER = "kill_driver"
    DRAIN_NODE = "drain_node"
    LOSE_NODE = "lose_node"
    ADD_NODE = "add_node"
    CORRUPT_CHECKPOINT = "corrupt_checkpoint"
    TRUNCATE_CHECKPOINT = "truncate_checkpoint"
    FULL_DISK = "full_disk"
    CUT_STORAGE = "cut_storage"


# The run is told beforehand and saves: only the step that is under way may be done again.
ANNOUNCED = frozenset({Fault.TERM_WORKER, Fault.DRAIN_NODE, Fault.ADD_NODE})
DAMAGING = frozenset({Fault.CORRUPT_CHECKPOINT, Fault.TRUNCATE_CHECKPOINT})
OUTAGES = frozenset({Fault.FULL_DISK, Fault.CUT_STORAGE})


@dataclass(frozen=True)
class Planned:
    """A fault that strikes as soon as `step` is logged."""

    fault: Fault
    step: int


def settle_steps(config: Config) -> int:
    """Steps after a restart within which a new checkpoint is sure to be there, two of them after a damaged one."""
    return 2 * config.checkpoint.every + config.checkpoint.overlap_steps + 1


def redone_limit(fault: Fault, config: Config) -> int:
    """Most steps that a fault may cost: those since the newest checkpoint that was whole.

    A checkpoint counts once it is published, `overlap_steps` after its step.
    """
    checkpoint = config.checkpoint
    since = checkpoint.every + checkpoint.overlap_steps
    if fault in ANNOUNCED:
        return 1
    if fault in DAMAGING:
        return since + checkpoint.every
    if fault in OUTAGES:
        return since + checkpoint.max_failures * max(1, checkpoint.every // 10)
    return since


def plan_faults(faults: Sequence[Fault], count: int, seed: int, config: Config) -> tuple[Planned, ...]:
    """Spread `count` faults over the run, each kind as often as the others.

    Raises:
        ConfigError: the run is too short for them.
    """
    draw, settle = np.random.default_rng(seed), settle_steps(config)
    slot = (config.train.steps - 2 * settle) // count
    if slot < 2 * settle:
        raise ConfigError(
            f"train.steps={config.train.steps} is too short for {count} faults of {2 * settle} steps each.",
            f"use at least train.steps={2 * settle * (count + 1)}, or a smaller checkpoint.every.",
        )
    order: list[Fault] = []
    while len(order) < count:
        order += [faults[index] for index in draw.permutation(len(faults))]
    offsets = draw.integers(slot - settle, size=count)
    return tuple(
        Planned(fault, settle + number * slot + int(offset))
        for number, (fault, offset) in enumerate(zip(order[:count], offsets, strict=True))
    )
