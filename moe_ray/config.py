"""Every setting of the system: frozen pydantic models, loaded from YAML plus `section.field=value` overrides."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin

import yaml
from pydantic import Field, PositiveFloat, ValidationError, model_validator
from pydantic_core import PydanticUndefined

from moe_ray.errors import ConfigError
from moe_ray.explain import explain, names_of, sections_of, type_name
from moe_ray.model_config import ModelConfig, divisors
from moe_ray.section import (
    BelowOne,
    Count,
    Dtype,
    Factor,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    Width,
)
from moe_ray.serve_config import ServeConfig
from moe_ray.sweep_config import SweepConfig

Fraction = Annotated[float, Field(gt=0, lt=1)]
LogLevel = Literal["debug", "info", "warning", "error"]


class DataConfig(Section):
    """Where the text comes from and how it becomes token sequences."""

    sources: tuple[str, ...] = Field(
        ("corpus:king_james", "corpus:shakespeare", "corpus:code"),
        description="files, globs (.txt .md .jsonl .parquet, others as text) or corpus:NAME; "
        "`domain=path` sets the domain label",
    )
    text_field: str = Field("text", description="column of JSONL and Parquet rows that holds the text")
    sequence_length: Annotated[int, Field(ge=2)] = Field(256, description="tokens of one training sequence")
    validation_fraction: Fraction = Field(0.02, description="share of the documents held out for evaluation")
    path: str | None = Field(None, description="folder of the token shards; default: under train.storage")
    tokenizer: str | None = Field(None, description="a tokenizer.json to use instead of training one")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources and self.path is None:
            raise ConfigError(
                "data.sources=[] without data.path names no text.",
                "give files, globs or corpus:NAME, or the path of prepared data.",
            )
        return self


class ParallelConfig(Section):
    """How many workers train and how the experts are spread over them."""

    workers: Count | tuple[Count, Count] = Field(
        1, description="Ray Train workers (the world size); [min, max]: as many as the cluster has room for"
    )
    ep: Count | Literal["auto"] = Field(
        1,
        description="expert parallelism: most ranks that share one set of experts; each start takes the largest "
        "that divides world and experts; auto: no limit",
    )
    shard_dense: bool = Field(
        False, description="shard the parameters that are no experts over all workers (FSDP2)"
    )
    shard_experts: bool = Field(
        False, description="shard each expert over the workers that hold copies of it (FSDP2)"
    )
    memory_gib: PositiveFloat | None = Field(
        None, description="memory of a worker that planning counts on; default: what its device or node has"
    )
    dispatch_buffer_factor: Factor = Field(
        2.0,
        description="rows whose expert activations a worker keeps, over the balanced share; what exceeds them is "
        "recomputed in the backward pass",
    )
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs granted to a worker, also its thread count")
    use_gpu: bool = Field(False, description="one GPU a worker, NCCL instead of gloo")
    resources: dict[str, PositiveFloat] = Field(
        {},
        description="Ray's custom resources of a worker, such as {spot: 1}: only nodes that have them train",
    )
    timeout_seconds: PositiveInt = Field(
        300, description="a collective, or a worker's silence, that lasts longer counts as a failure"
    )
    grow_after_seconds: NonNegativeFloat = Field(
        60.0, description="a world that could grow trains for at least this long before it restarts larger"
    )
    yield_after_seconds: NonNegativeFloat | None = Field(
        None,
        description="workers that replicas of an endpoint on the same cluster have waited for, for so long, save "
        "and make way, down to the least of parallel.workers; null: never",
    )
    return_after_seconds: NonNegativeFloat = Field(
        60.0, description="a world whose workers have made way for replicas does not grow for so long"
    )
    max_failures: PositiveInt = Field(
        5, description="failures in a row without a new checkpoint in between before training gives up"
    )

    @property
    def min_workers(self) -> int:
        """Smallest world that may train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Largest world that may train."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ConfigError(
                f"parallel.workers={list(self.workers)!r} begins with the larger number.",  # ty: ignore
                "write [min, max].",
            )
        if isinstance(self.workers, int) and isinstance(self.ep, int) and self.workers % self.ep:
            raise ConfigError(
                f"parallel.ep={self.ep} does not divide parallel.workers={self.workers}.",
                f"use one of {divisors(self.workers)}.",
            )
        if self.yield_after_seconds is not None and self.min_workers == self.max_workers:
            raise ConfigError(
                f"parallel.yield_after_seconds={self.yield_after_seconds:g} wants workers to make way, and "
                f"parallel.workers={self.workers} is a fixed number.",
                "write parallel.workers=[min, max], or leave the other one out.",
            )
        for name in self.resources:
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ConfigError(
                    f"parallel.resources names {name!r}, which is no custom resource.",
                    "use parallel.cpus_per_worker and parallel.use_gpu for CPUs and GPUs.",
                )
        return self


class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay."""

    lr: PositiveFloat = Field(1e-3, description="peak learning rate")
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="final over peak learning rate")
    warmup_steps: NonNegativeInt = Field(100, description="steps of linear warm-up")
    weight_decay: NonNegativeFloat = Field(0.1, description="decoupled weight decay of matrices")
    beta1: BelowOne = Field(0.9, description="AdamW beta1")
    beta2: BelowOne = Field(0.95, description="AdamW beta2")
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon")
    clip_norm: PositiveFloat = Field(1.0, description="largest global gradient norm")


class TrainConfig(Section):
    """The training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "run", description="name of the run; its folder is STORAGE/NAME"
    )
    storage: str = Field(
        "~/moe_ray",
        description="folder of all runs, reachable from every node, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX",
    )
    steps: PositiveInt = Field(1000, description="optimizer steps")
    until: PositiveInt | None = Field(
        None, description="end after this step, saved, on the schedule of `steps`; null: after the last one"
    )
    global_batch: Width = Field(16, description="sequences of one optimizer step, over all workers")
    micro_batch: Width = Field(8, description="most sequences of one forward pass of a worker")
    dtype: Dtype = Field("float32", description="compute type; parameters and optimizer stay in float32")
    seed: NonNegativeInt = Field(0, description="seed of initialisation and data order")
    log_every: PositiveInt = Field(10, description="steps between logged metrics")
    eval_every: PositiveInt = Field(200, description="steps between evaluations")
    eval_batches: Width = Field(8, description="global batches of one evaluation")
    max_bad_steps: PositiveInt = Field(
        5,
        description="steps in a row with a loss or gradient that is not finite, skipped, before training stops",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.until is not None and self.until > self.steps:
            raise ConfigError(
                f"train.until={self.until} is after the last step, train.steps={self.steps}.",
                "lower train.until, or leave it out.",
            )
        scheme, separator, _ = self.storage.partition("://")
        if separator and scheme in ("s3", "gs"):
            return self
        if separator:
            raise ConfigError(
                f"train.storage={self.storage!r} has the unknown scheme {scheme!r}.",
                "give a path such as ~/moe_ray, s3://bucket/folder or gs://bucket/folder.",
            )
        expanded = os.path.expanduser(self.storage)
        if not self.storage or "\0" in self.storage or expanded.startswith("~"):
            raise ConfigError(
                f"train.storage={self.storage!r} is no path of a folder.", "give a path such as ~/moe_ray."
            )
        return self

    @property
    def last_step(self) -> int:
        """Step after which training ends."""
        return self.steps if self.until is None else self.until

    @property
    def run_dir(self) -> Path:
        """Folder of this run, for storage on a disk."""
        assert "://" not in self.storage, "an object store has no folders"
        return Path(self.storage).expanduser() / self.name

    @property
    def run_uri(self) -> str:
        """Where this run is stored: a path, or a URL with the query of `storage`."""
        if "://" not in self.storage:
            return str(self.run_dir)
        base, mark, query = self.storage.partition("?")
        return f"{base.rstrip('/')}/{self.name}{mark}{query}"


class CheckpointConfig(Section):
    """When the training state is saved and how much of it is kept."""

    every: PositiveInt = Field(200, description="steps between checkpoints; the last step is always saved")
    keep_last: PositiveInt = Field(3, description="newest checkpoints that are kept")
    keep_every: NonNegativeInt = Field(0, description="keep also those whose step is a multiple of this; 0: none")
    keep_best: NonNegativeInt = Field(0, description="keep also this many with the best `best_metric`")
    best_metric: str = Field("val_loss", description="a number that the run logs")
    best_is: Literal["lowest", "highest"] = Field("lowest", description="which `best_metric` is best")
    overlap_steps: NonNegativeInt = Field(
        1,
        description="steps through which a checkpoint may be written, the last of which waits for it before its "
        "update; 0: training waits at once; n > 1: a loss can cost n - 1 steps more",
    )
    retry_seconds: NonNegativeFloat = Field(
        60.0, description="how long a failing storage operation is tried again"
    )
    max_failures: PositiveInt = Field(
        3, description="checkpoints in a row that could not be written before training stops"
    )


class TelemetryConfig(Section):
    """What the jobs say."""

    log_level: LogLevel = Field("info", description="least severe line logged")
    log_levels: dict[str, LogLevel] = Field(
        {}, description="the same by module, such as {moe_ray.training.restore: warning}"
    )
    log_format: Literal["text", "json"] = Field("text", description="readable lines, or an object a line")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (), description="experiment trackers that get what metrics.jsonl gets, each an extra of its name"
    )
    project: str = Field("moe_ray", description="MLflow's experiment, and the project in Weights & Biases")
    tracking_folder: str | None = Field(
        None, description="folder of what trackers keep on a disk; default: trackers/ in the run's"
    )
    mlflow_uri: str | None = Field(None, description="tracking server; default: mlflow.db in that folder")
    wandb_mode: Literal["offline", "online"] = Field(
        "offline", description="offline: files in that folder, for `wandb sync`; online: needs WANDB_API_KEY"
    )
    alerts: bool = Field(True, description="evaluate the alert rules while training, in the training command")
    check_seconds: PositiveFloat = Field(5.0, description="time between two evaluations of the alert rules")
    webhook_file: str | None = Field(
        None,
        description="file that holds the URL to which alerts are POSTed as JSON; default: that of the variable "
        "MOE_RAY_WEBHOOK_URL, if it is set",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.log_levels:
            if name.split(".")[0] != "moe_ray":
                raise ConfigError(
                    f"telemetry.log_levels names {name!r}, which is no module of moe_ray.",
                    "write for example {moe_ray.training.restore: warning}.",
                )
        if "@" in (self.mlflow_uri or ""):
            raise ConfigError(
                "telemetry.mlflow_uri holds a user or password, and settings are written down with each run.",
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead.",
            )
        return self


class Config(Section):
    """All sections. Immutable once built; every combination it holds is possible."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    serve: ServeConfig = ServeConfig()
    sweep: SweepConfig = SweepConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        workers, ep = self.parallel.workers, self.parallel.ep
        fixed = isinstance(workers, int) and isinstance(ep, int)
        if fixed and self.model.is_known("num_experts") and self.model.num_experts % ep:
            raise ConfigError(
                f"parallel.ep={ep} does not divide model.num_experts={self.model.num_experts}.",
                f"use one of {divisors(self.model.num_experts)} that also divides parallel.workers.",
            )
        if self.optim.warmup_steps >= self.train.steps and self.optim.warmup_steps > 0:
            raise ConfigError(
                f"optim.warmup_steps={self.optim.warmup_steps} is not less than train.steps={self.train.steps}.",
                "lower optim.warmup_steps or raise train.steps.",
            )
        needs_folder = set(self.telemetry.trackers) - ({"mlflow"} if self.telemetry.mlflow_uri else set())
        if needs_folder and self.telemetry.tracking_folder is None and "://" in self.train.storage:
            raise ConfigError(
                f"telemetry.trackers={sorted(needs_folder)} keep files, and {self.train.storage!r} is no folder.",
                "set telemetry.tracking_folder to one that lasts.",
            )
        if not self.model.is_known("max_sequence_length"):
            return self
        if self.data.sequence_length > self.model.max_sequence_length:
            raise ConfigError(
                f"data.sequence_length={self.data.sequence_length} is longer than "
                f"model.max_sequence_length={self.model.max_sequence_length}.",
                "lower data.sequence_length or raise model.max_sequence_length.",
            )
        limit = self.model.max_sequence_length
        if self.serve.max_context is not None and self.serve.max_context > limit:
            raise ConfigError(
                f"serve.max_context={self.serve.max_context} is longer than model.max_sequence_length={limit}.",
                f"use at most {limit}.",
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file of sections and apply `section.field=value` overrides, whose values are YAML.

    Raises:
        ConfigError: the file is missing or no YAML mapping, or a setting is unknown, wrong or impossible.
    """
    try:
        tree = _StrictLoader(Path(path).read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise ConfigError(f"config file {str(path)!r} does not exist.", "give the path of a YAML file.") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"config file {str(path)!r} cannot be read: {_one_line(error)}.", "give a valid YAML file."
        ) from None
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(
            f"config file {str(path)!r} is not a mapping.", "write sections such as `train: {steps: 10}`."
        )
    return build_config(tree or {}, overrides)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(problem=f"{key!r} stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def build_config(tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build a `Config` from nested dictionaries and overrides.

    Raises:
        ConfigError: a setting is unknown, wrong or impossible.
    """
    # A section without fields is null in YAML.
    sections = {name: {} if fields is None else fields for name, fields in tree.items()}
    merged = {name: dict(fields) if isinstance(fields, dict) else fields for name, fields in sections.items()}
    for override in overrides:
        _apply_override(merged, override)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise explain(error, Config) from None


def check_setting(name: str, value: Any) -> Any:
    """Say whether `section.field` may have this value, whatever the other settings are.

    Returns:
        The value as it is read; as given if it is impossible beside the defaults.

    Raises:
        ConfigError: it is unknown or never has this value.
    """
    section, _, field = name.partition(".")
    try:
        found = Config.model_validate({section: {field: value} if field else value})
    except ValidationError as error:
        raise explain(error, Config) from None
    except ConfigError:
        # Others may make it possible.
        return value
    return getattr(getattr(found, section), field) if field else getattr(found, section)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    section, dot, field = key.strip().partition(".")
    if not separator or not dot or not field:
        raise ConfigError(
            f"override {override!r} is not section.field=value.", "write for example train.steps=50."
        )
    try:
        value = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        raise ConfigError(f"override {override!r} holds no YAML value.", "quote the value.") from None
    # YAML 1.1 reads 3e-4 as text because it has no dot; people mean the number.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    fields = tree.setdefault(section, {})
    if not isinstance(fields, dict):
        raise ConfigError(f"section {section!r} is not a mapping.", f"write {section}: {{{field}: {text}}}.")
    name, dot, key = field.partition(".")
    info = Config.model_fields.get(section)
    before = fields.get(name) or {}
    if dot and info is not None and _is_mapping(info.annotation, name) and isinstance(before, dict):
        # Keys of a mapping have dots of their own: sweep.space.optim.lr={…}.
        fields[name] = {**before, key: value}
    else:
        fields[field] = value


def _is_mapping(section: Any, field: str) -> bool:
    info = section.model_fields.get(field)
    return info is not None and get_origin(info.annotation) is dict


def setting_names() -> Iterator[str]:
    """Every valid `section.field`, after the section names themselves."""
    return names_of(Config)


def describe_settings() -> str:
    """Every setting with its type, default and meaning, for `--help`."""
    lines = []
    for name, section in sections_of(Config):
        lines.append(f"{name}: {(section.__doc__ or '').strip()}")
        for field, info in section.model_fields.items():
            default = yaml.safe_dump(_plain(info.default), default_flow_style=True, width=10_000).splitlines()[0]
            lines.append(f"  {name}.{field}  ({type_name(info.annotation)}, default {default})")
            lines.append(f"      {info.description}")
    return "\n".join(lines)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else None if value is PydanticUndefined else value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
