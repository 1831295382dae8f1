"""What a model costs, as part of an `Analysis`; `cost.py` has the formulae."""

from typing import Literal

from moe_ray.analytics.part import Part, Real


class Memory(Part):
    """Bytes. `training` is of one rank, the rest of one copy of the model; activations are of a micro-batch."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    kv_cache_per_token: int


class Communication(Part):
    """Bytes that leave a rank: of a token in a training step, and of the gradients of a step."""

    dispatch_forward: Real
    combine_forward: Real
    dispatch_backward: Real
    combine_backward: Real
    gradients_per_step: Real


class Speed(Part):
    """Predicted tokens/s of a hardware profile: training on the run's ranks, the rest on one device.

    Attributes:
        training_bound, prefill_bound, decode_bound: what is slowest.
    """

    profile: str
    training: Real
    prefill: Real
    decode: Real
    training_bound: str
    prefill_bound: str
    decode_bound: str
    fits: bool


class ModelCost(Part):
    """One model: ours, or a dense one of its active or of its total size.

    Attributes:
        params, active_params: in all, and those that one token uses.
        training_flops, prefill_flops, decode_flops: of one token, at `Cost.context`; training both ways.
        speeds: one for each profile.
    """

    name: Literal["moe", "dense, equal active size", "dense, equal total size"]
    params: int
    active_params: int
    training_flops: float
    prefill_flops: float
    decode_flops: float
    memory: Memory
    communication: Communication
    speeds: tuple[Speed, ...]


class Profile(Part):
    """A device; FLOP/s at the dtype, bytes/s, bytes.

    Attributes:
        network_bandwidth: that leaves a rank.
        efficiency: share of `flops` that a whole model reaches.
        source: where the figures are from, such as a data sheet or `measured`.
    """

    name: str
    flops: Real
    memory_bandwidth: Real
    network_bandwidth: Real
    memory: int
    efficiency: Real
    source: str


class Measured(Part):
    """Tokens/s of the run's training, median over its logged steps, and predicted over measured by profile."""

    training: Real
    predicted_over_measured: dict[str, Real]


class Cost(Part):
    """What the model costs. Attention is counted over `context` tokens; training over `sequence_length`."""

    dtype: str
    world_size: int
    ep: int
    context: int
    sequence_length: int
    batch: int
    profiles: tuple[Profile, ...]
    models: tuple[ModelCost, ...]
    measured: Measured | None
