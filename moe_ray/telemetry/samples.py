"""What a training run logs, as samples of the catalogue's metrics."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moe_ray.config import Config
from moe_ray.errors import ConfigError
from moe_ray.explain import nearest
from moe_ray.telemetry.records import BY_DOMAIN, BY_LAYER, is_number

PHASES = ("data", "forward", "dispatch", "backward", "reduce", "optimizer")
EVENTS = ("job", "start", "failure", "waiting", "drain", "resize", "restart", "yield", "stop")
# Of a record of metrics.jsonl: fields with the same meaning under another name.
_NUMBERS = {
    "moe_train_step": "step",
    "moe_train_tokens": "tokens",
    "moe_train_loss": "loss",
    "moe_train_loss_over_best": "loss_over_best",
    "moe_train_perplexity": "perplexity",
    "moe_train_grad_norm": "grad_norm",
    "moe_train_lr": "lr",
    "moe_train_tokens_per_second": "tokens_per_second",
    "moe_train_step_seconds": "step_seconds",
    "moe_train_skipped_steps": "skipped_steps",
    "moe_train_last_step_time": "time",
    "moe_train_world_size": "world_size",
    "moe_train_ep": "ep",
    "moe_train_memory_bytes": "memory_bytes",
    "moe_train_resumed_step": "resumed_step",
    "moe_train_redone_steps": "redone_steps",
    "moe_train_load_balancing_loss": "load_balancing_loss",
    "moe_train_router_z_loss": "router_z_loss",
    "moe_train_val_loss": "val_loss",
    "moe_train_val_perplexity": "val_perplexity",
    "moe_expert_dropped_fraction": "dropped_fraction",
    "moe_checkpoint_last_step": "checkpoint_step",
    "moe_checkpoint_last_time": "checkpoint_time",
    "moe_checkpoint_stall_seconds": "checkpoint_stall_seconds",
    "moe_checkpoint_write_seconds": "checkpoint_write_seconds",
    "moe_checkpoint_failures": "failed_checkpoints",
}
_BY_LAYER = {
    "moe_expert_load_cv": "load_cv_by_layer",
    "moe_expert_collapse": "collapse_by_layer",
    "moe_expert_load_variance": "load_variance_by_layer",
    "moe_expert_routing_entropy": "routing_entropy_by_layer",
    "moe_expert_dead": "dead_experts_by_layer",
}
# Numbers of a record that only evaluations have, and all that a record may have.
EVALUATED = frozenset({"val_loss", "val_perplexity"})
RECORDED = frozenset(
    {
        *_NUMBERS.values(),
        *(f"{phase}_seconds" for phase in PHASES),
        *(
            "load_cv",
            "load_variance",
            "load_max_over_mean",
            "routing_entropy",
            "router_confidence",
            "router_margin",
        ),
        *("dead_experts", "overloaded_experts", "restore_seconds", "sample_checksum"),
    }
)


def check_metric(where: str, metric: str) -> None:
    """Refuse what no record of a run has.

    Raises:
        ConfigError: `where`, a setting, names it.
    """
    if metric.endswith((BY_DOMAIN, BY_LAYER)):
        raise ConfigError(f"{where} names {metric!r}, which is not one number.", "name one, such as val_loss.")
    if metric not in RECORDED:
        raise ConfigError(
            f"{where} names {metric!r}, which no run logs.",
            f"did you mean {nearest(metric, sorted(RECORDED))!r}? All are {', '.join(sorted(RECORDED))}.",
        )


class Sample(NamedTuple):
    """A value of a metric.

    Attributes:
        name: of the catalogue.
        labels: all of the metric's.
        value: of a gauge; what a counter grows by; one observation of a histogram.
    """

    name: str
    labels: Mapping[str, str]
    value: float


def training_samples(record: Mapping[str, Any], config: Config) -> list[Sample]:
    """What one record of metrics.jsonl says; numbers that are missing or not finite say nothing."""
    run = {"run": config.train.name}
    found = [Sample("moe_train_target_steps", run, config.train.steps)]
    found += [Sample(name, run, record.get(field)) for name, field in _NUMBERS.items()]  # ty: ignore
    found += [
        Sample("moe_train_phase_seconds", run | {"phase": phase}, record.get(f"{phase}_seconds"))  # ty: ignore
        for phase in PHASES
    ]
    found += [
        Sample("moe_train_val_domain_perplexity", run | {"domain": domain}, perplexity)
        for domain, perplexity in (record.get(BY_DOMAIN) or {}).items()
    ]
    found += _expected_seconds(record, config, run)
    found += _expert_samples(record, config, run)
    return [sample for sample in found if is_number(sample.value)]


def _expected_seconds(record: Mapping[str, Any], config: Config, run: Mapping[str, str]) -> Iterator[Sample]:
    """How long it should take until the next logged step and checkpoint."""
    logged = record.get("step_seconds")
    seconds = float(logged) if is_number(logged) else math.nan  # ty: ignore
    yield Sample("moe_train_log_seconds", run, seconds * config.train.log_every)
    yield Sample("moe_checkpoint_due_seconds", run, seconds * config.checkpoint.every)


def event_sample(run: str, event: str, times: int = 1) -> Sample:
    """That something happened to the workers of a run, or with 0 that it has not yet."""
    return Sample("moe_train_events", {"run": run, "event": event}, times)


def submission_samples(run: str, submission: str | None) -> list[Sample]:
    """Which job of Ray's job server trains the run; nothing of one that was not submitted."""
    return [Sample("moe_train_submission", {"run": run, "submission": submission}, 1)] if submission else []


def _expert_samples(record: Mapping[str, Any], config: Config, run: Mapping[str, str]) -> Iterator[Sample]:
    """Layers are numbered as in the model, where some may have no experts."""
    layers = [{**run, "layer": str(layer)} for layer in config.model.moe_layers]
    for name, field in _BY_LAYER.items():
        for labels, value in zip(layers, record.get(field) or (), strict=False):
            yield Sample(name, labels, value)
    for labels, fractions in zip(layers, record.get("load_by_layer") or (), strict=False):
        for expert, fraction in enumerate(fractions):
            yield Sample("moe_expert_load", {**labels, "expert": str(expert)}, fraction * len(fractions))
