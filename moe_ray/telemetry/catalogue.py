"""Every metric by name: what reports one, dashboards, alert rules and docs are made from it or tested against it.

Ray's metrics agent puts `ray_` before a name; `serve` metrics are also served, without it, by each replica's
`/metrics`.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Unit = Literal["", "bytes", "ratio", "requests", "seconds", "steps", "tokens", "tokens/s", "unix seconds"]
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


@dataclass(frozen=True)
class Metric:
    """One row of the catalogue.

    Attributes:
        name: begins with `moe_` and its area; Prometheus adds `_total` to counters.
        unit: of its values; "" for counts and numbers without one.
        labels: every series has exactly these.
        series: most series that one process reports; what exceeds them is left out and said once in the log.
        buckets: upper bounds of a histogram.
        source: what reports it. `train`: rank 0 of a run; `driver`: Ray Train's controller, which
            outlives the workers; `serve`: a replica; `monitor`: the exporter, which runs outside Ray as well.
    """

    name: str
    kind: Kind
    unit: Unit
    help: str
    source: Literal["train", "driver", "serve", "monitor"]
    labels: tuple[str, ...] = ()
    series: int = 1
    buckets: tuple[float, ...] = ()

    @property
    def area(self) -> str:
        """The second word of the name."""
        return self.name.split("_")[1]

    @property
    def exposed_name(self) -> str:
        """As Prometheus sees it through Ray, or from the monitor."""
        prefix = "" if self.source == "monitor" else "ray_"
        return f"{prefix}{self.name}{'_total' if self.kind == 'counter' else ''}"


def _train(name: str, unit: Unit, help: str, *labels: str, kind: Kind = "gauge", series: int = 1) -> Metric:
    return Metric(f"moe_{name}", kind, unit, help, "train", ("run", *labels), series)


def _serve(name: str, unit: Unit, help: str, *labels: str, kind: Kind = "counter", series: int = 1) -> Metric:
    buckets = _LATENCIES if kind == "histogram" else ()
    return Metric(f"moe_serve_{name}", kind, unit, help, "serve", ("replica", *labels), series, buckets)


def _monitor(name: str, unit: Unit, help: str, *labels: str, series: int = 1) -> Metric:
    return Metric(f"moe_{name}", "gauge", unit, help, "monitor", labels, series)


_TRAIN = (
    _train("train_step", "steps", "Finished optimizer steps."),
    _train("train_target_steps", "steps", "Steps that the run is to have."),
    _train("train_tokens", "tokens", "Training tokens so far."),
    _train("train_loss", "", "Next-token loss of the logged step, in nats."),
    _train("train_loss_over_best", "ratio", "Smoothed loss over the lowest that it has been."),
    _train("train_perplexity", "", "Exponential of the loss."),
    _train("train_grad_norm", "", "Global gradient norm before clipping."),
    _train("train_lr", "", "Learning rate."),
    _train("train_tokens_per_second", "tokens/s", "Mean since the last logged step."),
    _train("train_step_seconds", "seconds", "Mean since the last logged step."),
    _train("train_phase_seconds", "seconds", "Exclusive time of a phase of the logged step.", "phase", series=16),
    _train("train_skipped_steps", "steps", "Steps skipped because they were not finite.", kind="counter"),
    _train("train_last_step_time", "unix seconds", "When the last logged step ended."),
    _train("train_log_seconds", "seconds", "Usual time between logged steps: train.log_every times the step's."),
    _train("train_world_size", "", "Workers that train."),
    _train("train_ep", "", "Ranks that share one set of experts."),
    _train("train_memory_bytes", "bytes", "Memory of rank 0: GPU peak, or resident memory on a CPU."),
    _train("train_resumed_step", "steps", "Where this start of the workers went on."),
    _train("train_redone_steps", "steps", "Steps that this start did again."),
    _train("train_load_balancing_loss", "", "Before its weight, mean over layers."),
    _train("train_router_z_loss", "", "Before its weight, mean over layers."),
    _train("train_val_loss", "", "Loss on held-out text, in nats."),
    _train("train_val_perplexity", "", "Perplexity on held-out text."),
    _train("train_val_domain_perplexity", "", "The same of one domain.", "domain", series=32),
    _train("train_submission", "", "1; the label names the submitted job that trains.", "submission", series=2),
    Metric(
        "moe_train_events", "counter", "", "Starts, failures, resizes, drains.", "driver", ("run", "event"), 16
    ),
)
_EXPERTS = (
    _train("expert_load", "ratio", "Load of an expert over the balanced one.", "layer", "expert", series=8192),
    _train("expert_load_cv", "ratio", "Coefficient of variation of the load.", "layer", series=256),
    _train(
        "expert_collapse",
        "ratio",
        "Load imbalance of ten steps over the largest one.",
        "layer",
        series=256,
    ),
    _train("expert_load_variance", "", "Variance of the load fractions.", "layer", series=256),
    _train(
        "expert_routing_entropy", "ratio", "Entropy of the router over that of even ones.", "layer", series=256
    ),
    _train("expert_dead", "", "Experts that no token chose since the last logged step.", "layer", series=256),
    _train("expert_dropped_fraction", "ratio", "Routed pairs that an expert had no room for."),
)
_CHECKPOINT = (
    _train("checkpoint_last_step", "steps", "Step of the newest checkpoint."),
    _train(
        "checkpoint_last_time", "unix seconds", "When the newest checkpoint became visible, or this start began."
    ),
    _train("checkpoint_stall_seconds", "seconds", "How long the last one held up training."),
    _train("checkpoint_write_seconds", "seconds", "How long the last one took to become visible."),
    _train("checkpoint_due_seconds", "seconds", "Usual time between checkpoints: checkpoint.every steps."),
    _train("checkpoint_failures", "", "Checkpoints in a row that could not be written."),
)
_SERVE = (
    _serve("http_requests", "requests", "Answered requests.", "route", "status", "key", series=2000),
    _serve("key_tokens", "tokens", "Tokens by API key.", "key", "kind", series=1000),
    _serve("http_seconds", "seconds", "Time of a request.", "route", kind="histogram", series=16),
    _serve(
        "first_event_seconds", "seconds", "Time to a stream's first event.", "route", kind="histogram", series=16
    ),
    _serve("waiting", "requests", "Requests that wait for a place in the batch.", kind="gauge"),
    _serve("running", "requests", "Requests in the batch.", kind="gauge"),
    _serve("queued_tokens", "tokens", "Tokens still to be computed, nearly all of prompts.", kind="gauge"),
    _serve("blocks_total", "", "Blocks of the KV cache.", kind="gauge"),
    _serve("blocks_used", "", "Blocks of running requests.", kind="gauge"),
    _serve("blocks_known", "", "Blocks that nobody uses and that hold a shared prefix.", kind="gauge"),
    _serve("prompt_tokens", "tokens", "Tokens of all prompts that were accepted."),
    _serve("prefix_tokens", "tokens", "Tokens of the prompts that ran."),
    _serve("prefix_hit_tokens", "tokens", "Of these, found in the KV cache."),
    _serve("computed_tokens", "tokens", "Tokens that went through the model."),
    _serve("generated_tokens", "tokens", "Tokens that were sampled."),
    _serve("preemptions", "", "Times that a request lost its blocks to another."),
    _serve("missed_deadlines", "requests", "Requests that ended with their deadline."),
)
_CACHE = (
    _serve("tier_memory_hits", "", "Blocks of prompts found compressed in memory."),
    _serve("tier_disk_hits", "", "Blocks of prompts found on disk."),
    _serve("tier_misses", "", "Blocks of prompts found in no tier."),
    _serve("tier_prefetched", "", "Blocks that went from disk to memory before they were asked for."),
    _serve("tier_prefetch_hits", "", "Of these, asked for later."),
    _serve("tier_memory_bytes", "bytes", "Compressed blocks in memory.", kind="gauge"),
    _serve("tier_disk_bytes", "bytes", "Compressed blocks on disk.", kind="gauge"),
    _serve("tier_dropped", "", "Blocks that were not kept because too many waited."),
    _serve("tier_damaged", "", "Files that were removed because of their checksum."),
    _serve("tier_errors", "", "Operations that the disk refused."),
    _serve("response_cache_hits", "", "Answers found ready in memory."),
    _serve("response_memory_hits", "", "Answers found compressed in memory."),
    _serve("response_disk_hits", "", "Answers found on disk."),
    _serve("response_misses", "", "Texts that the same answer may be given for, found in no tier."),
    _serve("response_cache_bytes", "bytes", "Ready answers in memory.", kind="gauge"),
    _serve("response_memory_bytes", "bytes", "Compressed answers in memory.", kind="gauge"),
    _serve("response_disk_bytes", "bytes", "Answers on disk.", kind="gauge"),
    _serve("response_dropped", "", "Answers that were not kept because too many waited."),
    _serve("response_damaged", "", "Files of answers that were removed because of their checksum."),
    _serve("response_errors", "", "Operations that the disk refused for answers."),
    _serve("expert_hits", "", "Experts that a step needed and found in memory."),
    _serve("expert_misses", "", "Experts that a step needed and read from disk."),
    _serve("expert_prefetched", "", "Experts read ahead by a guess."),
    _serve("expert_prefetch_hits", "", "Of these, needed before they were given up."),
    _serve("expert_bytes_read", "bytes", "Experts read from disk."),
    _serve("expert_bytes_held", "bytes", "Experts in memory.", kind="gauge"),
    _serve("expert_wait_seconds", "seconds", "Time that steps waited for experts from disk."),
    _serve("affinity_kept", "requests", "Answered by the replica that they came to."),
    _serve("affinity_handed", "requests", "Handed to a replica whose cache knew the beginning."),
    _serve("affinity_unreached", "requests", "Of those kept, handed to a replica that did not begin to answer."),
    _serve("affinity_broken", "requests", "Of those handed, lost with the other replica."),
    _serve("affinity_unasked", "requests", "Kept because the directory did not answer."),
)
_CLUSTER = (
    _monitor("cluster_nodes", "", "Nodes of the Ray cluster that are alive."),
    _monitor("cluster_nodes_lost", "", "Nodes that have died without being drained since the monitor's start."),
    _monitor("cluster_replicas", "", "Replicas of a Serve deployment by state.", "app", "state", series=64),
    _monitor("cluster_replicas_wanted", "", "Replicas that autoscaling wants.", "app", series=16),
    _monitor("cluster_replicas_lost", "", "Replicas that have died since the monitor's start.", "app", series=16),
    _monitor("cluster_ready", "", "1 if the endpoint's /readyz answers, else 0.", "app", series=16),
)
_HOST = (
    _monitor("host_cpu_ratio", "ratio", "Processors in use."),
    _monitor("host_memory_used_bytes", "bytes", "Memory in use."),
    _monitor("host_memory_total_bytes", "bytes", "Memory of the machine."),
    _monitor("host_disk_free_bytes", "bytes", "Free space of a watched folder.", "path", series=16),
    _monitor("host_disk_total_bytes", "bytes", "Size of the disk of a watched folder.", "path", series=16),
    _monitor("host_gpu_utilization_ratio", "ratio", "Use of a GPU.", "gpu", series=16),
    _monitor("host_gpu_memory_used_bytes", "bytes", "Memory in use of a GPU.", "gpu", series=16),
    _monitor("host_gpu_memory_total_bytes", "bytes", "Memory of a GPU.", "gpu", series=16),
    _monitor(
        "storage_reachable", "", "1 if the storage of a run answers and takes a file, else 0.", "run", series=16
    ),
)
_HEALTH = (
    _monitor("health_score", "ratio", "1 healthy, 0.5 degraded, 0 unhealthy.", "component", series=16),
    _monitor("alert_firing", "", "1 while an alert fires, else 0.", "alert", "severity", series=64),
    _monitor("monitor_errors", "", "Observations that failed in the last round.", "source", series=16),
)

CATALOGUE: dict[str, Metric] = {
    metric.name: metric
    for metrics in (_TRAIN, _EXPERTS, _CHECKPOINT, _SERVE, _CACHE, _CLUSTER, _HOST, _HEALTH)
    for metric in metrics
}
