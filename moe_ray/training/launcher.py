"""Start a training run on a Ray cluster with Ray Train, from the driver."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import LoggingConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from moe_ray.checkpoint.catalog import newest_good
from moe_ray.config import Config, ModelConfig, ParallelConfig, build_config, to_yaml
from moe_ray.cpu import keep_freed_memory, set_threads
from moe_ray.data.prepare import prepare
from moe_ray.data.shards import read_index
from moe_ray.errors import ConfigError, MoeRayError, StorageError, TrainingError
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.models.moe import make_router
from moe_ray.parallel.mesh import build_mesh
from moe_ray.telemetry.logs import setup_logging
from moe_ray.telemetry.progress import show_progress
from moe_ray.training.loop import train
from moe_ray.training.resume import check_data, check_settings

_logger = logging.getLogger(__name__)


def run_training(config: Config) -> Path:
    """Prepare the data if need be, then train to `train.steps`, going on from the run's newest good checkpoint.

    Returns:
        The run directory.

    Raises:
        MoeRayError: whatever the user can mend, raised before any worker starts where that is possible.
    """
    config = resolve_model(_with_absolute_storage(config))
    _check_router(config.model)
    run_dir = config.train.run_dir
    found = newest_good(run_dir)
    if found:
        check_settings(found[1], config)
    data_dir = prepare(config)
    if found:
        check_data(found[1], read_index(data_dir))
        if found[1].step >= config.train.steps:
            _logger.info("run %s already has %d steps; nothing to do", run_dir, found[1].step)
            return run_dir
    _write_config(config)
    # The controller takes one report an interval; its default of 2 s would hold back short steps.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
    connect(config.parallel)
    try:
        with show_progress(run_dir, config.train.steps):
            _trainer(config, data_dir).fit()
    except WorkerGroupError as error:
        raise _first_cause(error) from error
    return run_dir


def _check_router(model: ModelConfig) -> None:
    with torch.device("meta"):
        make_router(model)
    always_one = model.route_norm or model.softmax_after_top_k
    if model.top_k == 1 and model.num_experts > 1 and always_one and model.router == "top_k":
        _logger.warning(
            "model.top_k=1 with route weights that sum to 1 gives every chosen expert the weight 1: the router "
            "learns from the auxiliary losses alone. Fix: model.route_norm=false model.softmax_after_top_k=false."
        )


def connect(parallel: ParallelConfig) -> None:
    """Join the cluster of RAY_ADDRESS (which a submitted job has), or start a local one that fits the workers."""
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True, logging_level=logging.WARNING)
        _warn_if_too_small(parallel)
        return
    # Logical CPUs: more workers than cores are slow, not wrong.
    num_cpus = max(os.cpu_count() or 1, math.ceil(parallel.max_workers * parallel.cpus_per_worker))
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=True,
        logging_level=logging.WARNING,
        _node_ip_address="127.0.0.1",
    )


def _warn_if_too_small(parallel: ParallelConfig) -> None:
    """Only a warning: a cluster that grows on demand may be small now."""
    has, needs = ray.cluster_resources().get("CPU", 0.0), parallel.min_workers * parallel.cpus_per_worker
    if needs > has:
        _logger.warning(
            "parallel.workers=%d with parallel.cpus_per_worker=%g need %g CPUs and the cluster has %g: training "
            "waits for more nodes. Fix: lower one of the two if none will come.",
            parallel.min_workers,
            parallel.cpus_per_worker,
            needs,
            has,
        )


def _trainer(config: Config, data_dir: Path) -> TorchTrainer:
    parallel = config.parallel
    return TorchTrainer(
        _worker,
        train_loop_config={"config": config.model_dump(mode="json"), "data_dir": str(data_dir)},
        torch_config=TorchConfig(
            backend="nccl" if parallel.use_gpu else "gloo", timeout_s=parallel.timeout_seconds
        ),
        scaling_config=ScalingConfig(  # ty: ignore
            num_workers=parallel.max_workers,
            use_gpu=parallel.use_gpu,
            resources_per_worker={"CPU": parallel.cpus_per_worker} | ({"GPU": 1} if parallel.use_gpu else {}),
        ),
        run_config=RunConfig(  # ty: ignore
            name="ray_train",
            storage_path=str(config.train.run_dir.resolve()),
            logging_config=LoggingConfig(log_level="WARNING"),  # ty: ignore
        ),
    )


def _worker(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs."""
    config = build_config(arguments["config"])
    setup_logging(config.telemetry.log_level)
    keep_freed_memory()
    set_threads(config.parallel.cpus_per_worker)
    device = get_device() if config.parallel.use_gpu else torch.device("cpu")
    train(config, build_mesh(int(config.parallel.ep), device), Path(arguments["data_dir"]), _report)


def _report(metrics: dict[str, Any]) -> None:
    """Ray Train keeps numbers; what is by layer stands in metrics.jsonl."""
    ray.train.report({name: value for name, value in metrics.items() if isinstance(value, int | float)})


def _with_absolute_storage(config: Config) -> Config:
    """The same settings for every process, whatever its working directory."""
    storage = Path(config.train.storage).expanduser()
    if not storage.is_absolute() and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise ConfigError(
            f"train.storage={config.train.storage!r} is relative, and a job's working directory does not last.",
            "give an absolute path, such as ~/moe_ray or /mnt/shared/moe_ray.",
        )
    # Not through all settings as a tree: which of them were set must stay known.
    train = config.train.model_copy(update={"storage": str(storage.resolve())})
    return config.model_copy(update={"train": train})


def _write_config(config: Config) -> None:
    path = config.train.run_dir / "config.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(".tmp")
        staged.write_text(to_yaml(config), encoding="utf-8")
        os.replace(staged, path)
    except OSError as error:
        raise StorageError(
            f"train.storage={config.train.storage!r}: {str(path)!r} cannot be written: {error.strerror}.",
            "set train.storage to a folder that can be written.",
        ) from None


def _first_cause(error: WorkerGroupError) -> MoeRayError:
    """The user's error among those of the workers, or the first of them as a TrainingError."""
    causes: list[BaseException] = []
    for failure in error.worker_failures.values():
        cause: BaseException | None = failure
        while cause is not None and cause not in causes:
            causes.append(cause)
            cause = getattr(cause, "cause", None) or getattr(cause, "_base_exc", None) or cause.__cause__
    for cause in causes:
        if isinstance(cause, MoeRayError) and "rank 0" not in cause.problem:
            return cause
    rank, failure = min(error.worker_failures.items(), key=lambda item: item[0])
    return TrainingError(
        f"training worker {rank} failed: {str(failure).strip().splitlines()[-1]}.",
        "see the worker's log in the Ray dashboard; the same command resumes from the newest checkpoint.",
    )
