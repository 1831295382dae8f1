"""Settings of an endpoint and its engine."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from moe_ray.errors import ConfigError
from moe_ray.section import Dtype, NonNegativeFloat, NonNegativeInt, PositiveInt, Quantize, Section, Width


class ServeConfig(Section):
    """The endpoint and its engine."""

    min_replicas: PositiveInt = Field(2, description="replicas when idle")
    max_replicas: PositiveInt = Field(16, description="most replicas")
    target_ongoing_requests: PositiveFloat = Field(
        4.0, description="requests a replica, waiting or running, that autoscaling aims at"
    )
    target_queued_tokens: PositiveFloat = Field(
        4096.0, description="tokens still to be computed by a replica, nearly all of prompts, that it aims at"
    )
    load_average_seconds: float = Field(
        2.0,
        gt=0.5,
        description="time over which it averages both, more than 0.5; replicas are added that much later",
    )
    scale_down_seconds: PositiveFloat = Field(
        30.0, description="how long fewer replicas must have been enough before some are taken away"
    )
    drain_seconds: PositiveFloat = Field(
        600.0, description="time that a replica has to finish its texts when it is taken away or replaced"
    )
    cpus_per_replica: PositiveFloat = Field(
        0.5, description="CPUs reserved by a replica; its threads are at least 1"
    )
    gpus_per_replica: NonNegativeFloat = Field(0.0, description="GPUs reserved by a replica")
    max_batch_size: Width = Field(64, description="requests that one replica decodes together")
    max_queued_requests: NonNegativeInt = Field(
        192, description="requests that wait in a replica before it answers 503"
    )
    max_queue_seconds: PositiveFloat = Field(
        30.0, description="expected time in its queue from which on a replica answers 503"
    )
    max_context: PositiveInt | None = Field(
        None, description="longest prompt plus completion; default: the model's"
    )
    kv_cache_bytes: PositiveInt | None = Field(
        None,
        description="memory of a replica for keys and values; default: max_batch_size full contexts, or less if "
        "max_replicas of them would take more than half of the node's free memory",
    )
    prefix_memory_bytes: NonNegativeInt = Field(
        0, description="memory of a replica for compressed prefixes that its KV cache has no room for"
    )
    prefix_folder: str | None = Field(
        None, description="local folder where such prefixes outlive a restart; replicas of a node share it"
    )
    prefix_disk_bytes: NonNegativeInt = Field(2**30, description="most bytes in prefix_folder")
    prefix_prefetch: bool = Field(
        False, description="bring prefixes from disk into memory that followed the same prompt before"
    )
    prefix_routing: bool = Field(
        False,
        description="let that replica answer whose cache knows how a prompt begins; replicas then reach each "
        "other on free ports of their nodes' addresses",
    )
    prefix_routing_bytes: PositiveInt = Field(
        2048, description="smallest request body that may go to another replica; smaller ones cost nothing"
    )
    response_cache_bytes: NonNegativeInt = Field(
        0,
        description="memory of a replica for finished answers that the same request would get again: "
        "temperature 0, or a seed",
    )
    response_memory_bytes: NonNegativeInt = Field(0, description="memory for compressed ones")
    response_folder: str | None = Field(
        None, description="local folder where they outlive a restart; replicas of a node share it"
    )
    response_disk_bytes: NonNegativeInt = Field(2**28, description="most bytes in response_folder")
    max_body_bytes: PositiveInt = Field(4_000_000, description="largest request body")
    max_body_seconds: PositiveFloat = Field(60.0, description="seconds that a request body may take to arrive")
    api_keys_file: str | None = Field(
        None, description="file of hashed API keys on every node; without it and MOE_RAY_API_KEYS anybody may ask"
    )
    audit_log: str | None = Field(None, description="file for a JSON line a request, or stderr; default: none")
    audit_prompts: bool = Field(False, description="write prompts into the audit log too")
    dtype: Dtype = Field("float32", description="type of the weights and the KV cache")
    quantize: Quantize = Field("none", description="experts with weights of 8 or 4 bits; all else keeps dtype")
    weights_folder: str | None = Field(
        None,
        description="folder of the files by which replicas of a node share the memory of their weights, private "
        'to the user; default: moe_ray/weights in XDG_CACHE_HOME or ~/.cache; "": each replica has its own copy',
    )
    expert_memory_bytes: PositiveInt | None = Field(
        None,
        description="memory of a replica for experts, which are then read from disk when they are needed, for "
        "models larger than memory, on CPUs; default: all experts are in memory",
    )
    expert_prefetch: bool = Field(
        False, description="read experts ahead that the next layer will likely choose, by what it chose before"
    )
    engine: Literal["moe_ray", "vllm"] = Field(
        "moe_ray",
        description="what generates: vllm is for GPUs, needs the extra 'vllm' and only generates, see docs/api.md",
    )
    runner: Literal["auto", "native", "torch"] = Field(
        "auto",
        description="what computes tokens: native is C++ for CPUs, compiled at the first start; "
        "auto takes it where there is a compiler and it knows the architecture",
    )
    follow: bool = Field(
        False, description="move to each newer good checkpoint of the run without a restart; needs checkpoint=RUN"
    )
    follow_poll_seconds: PositiveFloat = Field(5.0, description="time between two looks at a run that is followed")
    allow_unfaithful_routing: bool = Field(
        False, description="generate with a router that routes otherwise token by token than it did in training"
    )

    @property
    def max_unfinished(self) -> int:
        """Texts that a replica's engine holds at a time."""
        return self.max_batch_size + self.max_queued_requests

    @property
    def max_http_requests(self) -> int:
        """Requests that a replica reads, holds and answers at a time; twice, as some come or go slowly."""
        return 2 * self.max_unfinished

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ConfigError(
                f"serve.min_replicas={self.min_replicas} is more than serve.max_replicas={self.max_replicas}.",
                "raise serve.max_replicas or lower serve.min_replicas.",
            )
        if self.expert_memory_bytes is not None and (self.weights_folder == "" or self.gpus_per_replica):
            raise ConfigError(
                f"serve.expert_memory_bytes={self.expert_memory_bytes} needs a CPU and a file of the experts.",
                'leave out serve.gpus_per_replica, and serve.weights_folder="".',
            )
        if self.expert_prefetch and self.expert_memory_bytes is None:
            raise ConfigError(
                "serve.expert_prefetch=true has no meaning while all experts are in memory.",
                "set serve.expert_memory_bytes too.",
            )
        if self.audit_prompts and self.audit_log is None:
            raise ConfigError("serve.audit_prompts=true needs an audit log.", "set serve.audit_log too.")
        return self
