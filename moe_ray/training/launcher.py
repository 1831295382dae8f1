"""Start a training run on a Ray cluster with Ray Train, from the driver."""

import logging
import math
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, get_device

from moe_ray.checkpoint.catalog import is_whole, newest_manifest
from moe_ray.config import Config, ModelConfig, ParallelConfig, build_config, to_yaml
from moe_ray.cpu import keep_freed_memory, set_threads
from moe_ray.data.prepare import prepare
from moe_ray.data.shards import read_index
from moe_ray.data.share import obtain, share
from moe_ray.errors import ConfigError, TrainingError
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.models.moe import make_router
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.plan import describe, plan_mesh, worker_memory
from moe_ray.ray_metrics import RayMetrics
from moe_ray.storage import Storage, open_storage
from moe_ray.storage.lease import fence, hold
from moe_ray.submission import read_submission, with_absolute_storage
from moe_ray.telemetry.logs import setup_logging
from moe_ray.telemetry.progress import show_progress
from moe_ray.telemetry.run_log import RUN_SETTINGS, SWEEP_SETTINGS
from moe_ray.telemetry.samples import check_metric, submission_samples, training_samples
from moe_ray.telemetry.trackers.follow import check_trackers, follow_run
from moe_ray.telemetry.watcher import watch_training
from moe_ray.training.failures import as_our_error
from moe_ray.training.loop import Ended, train
from moe_ray.training.resume import check_data, check_settings
from moe_ray.training.trainer import ElasticTrainer, StopSwitch

_logger = logging.getLogger(__name__)
_REACH_SECONDS = 20.0
_LAST_PORT = 65_535


def run_training(config: Config, switch: StopSwitch | None = None) -> int:
    """Prepare the data if need be, then train to `train.steps`, or `train.until`, from the newest good checkpoint.

    Args:
        switch: ends the run early, which then prints no progress; None: signals do.

    Returns:
        The number of finished steps: fewer if the run was ended early.

    Raises:
        MoeRayError: whatever the user can mend, raised before any worker starts where that is possible.
    """
    config = resolve_model(with_absolute_storage(config))
    _check_router(config.model)
    check_metric("checkpoint.best_metric", config.checkpoint.best_metric)
    check_trackers(config)
    run = open_storage(config.train.run_uri, config.checkpoint.retry_seconds)
    if run.exists(SWEEP_SETTINGS):
        raise ConfigError(f"{run.uri!r} is the folder of a sweep.", "set another train.name.")
    with hold(run) as lease:
        return _run(config, run, lease.token, switch)


def _run(config: Config, run: Storage, lease: str, switch: StopSwitch | None) -> int:
    found = newest_manifest(run)
    if found:
        check_settings(found, config)
    data_dir = prepare(config)
    if found:
        check_data(found, read_index(data_dir))
        if found.step >= config.train.last_step and is_whole(run, found):
            _logger.info("run %s already has %d steps; nothing to do", run.uri, found.step)
            return found.step
    if run.local is None:
        share(data_dir, open_storage(config.train.storage, config.checkpoint.retry_seconds))
    run.write(RUN_SETTINGS, to_yaml(config).encode())
    _set_ray_train_defaults(config.parallel)
    connect(config.parallel)
    with (
        show_progress(run, config.train.last_step) if switch is None else nullcontext(),
        watch_training(run, config),
        tempfile.TemporaryDirectory(prefix="moe_ray-train-") as scratch,
    ):
        try:
            return _trainer(config, data_dir, lease, scratch, switch).fit().return_value.step  # ty: ignore
        except TrainingFailedError as error:
            raise as_our_error(error) from error


def _set_ray_train_defaults(parallel: ParallelConfig) -> None:
    defaults = {
        # How often the controller looks after the workers: with the default of 2 s it hears late of a loss.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(parallel.timeout_seconds),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
        # The world policy watches the nodes itself.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _check_router(model: ModelConfig) -> None:
    with torch.device("meta"):
        make_router(model)
    always_one = model.route_norm or model.softmax_after_top_k
    if model.top_k == 1 and model.num_experts > 1 and always_one and model.router == "top_k":
        _logger.warning(
            "model.top_k=1 with route weights that sum to 1 gives every chosen expert the weight 1: the router "
            "learns from the auxiliary losses alone. Fix: model.route_norm=false model.softmax_after_top_k=false."
        )


def connect(parallel: ParallelConfig, *, log_to_driver: bool = True) -> None:
    """Join the cluster of RAY_ADDRESS (which a submitted job has), or start a local one that fits the workers.

    Args:
        log_to_driver: print what processes of the cluster print.

    Raises:
        ConfigError: there is no cluster at RAY_ADDRESS.
        TrainingError: Ray does not start.
    """
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        _join(log_to_driver)
        _warn_if_too_small(parallel)
        return
    # Logical CPUs: more workers than cores are slow, not wrong.
    num_cpus = max(os.cpu_count() or 1, math.ceil(parallel.max_workers * parallel.cpus_per_worker))
    _logger.info("starting Ray on this machine")
    # That a token is required is for the documentation to say.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=True,
                log_to_driver=log_to_driver,
                logging_level=logging.WARNING,
                _node_ip_address="127.0.0.1",
            )
            return
        # Ray raises bare exceptions here too, as when a busy machine takes too long.
        except Exception as error:
            if is_last or "timed out" not in str(error):
                raise TrainingError(
                    f"Ray did not start on this machine: {_first_line(error)}.",
                    "see that memory, processors and room for temporary files are left, and run the same command "
                    "again.",
                ) from error
            _logger.warning("Ray did not start in time; trying once more")
            ray.shutdown()


def _join(log_to_driver: bool) -> None:
    address = os.environ["RAY_ADDRESS"]
    _logger.info("joining the cluster at %s", address)
    try:
        _reach(address)
        ray.init(log_to_driver=log_to_driver, logging_level=logging.WARNING)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"there is no cluster at RAY_ADDRESS={address!r}: {_first_line(error)}.",
            "name one that runs, such as by `source runs/cluster/env`, or unset the variable.",
        ) from None


def _reach(address: str) -> None:
    """Ray itself waits for minutes where nothing listens."""
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        if int(port) > _LAST_PORT:
            raise ValueError(f"{port} is no port")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


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


def _trainer(
    config: Config, data_dir: Path, lease: str, scratch: str, switch: StopSwitch | None
) -> ElasticTrainer:
    parallel, submission = config.parallel, read_submission()
    return ElasticTrainer(
        _worker,
        config=config,
        switch=switch,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "data_dir": str(data_dir),
            "data_digest": read_index(data_dir).digest,
            "lease": lease,
            "submission": submission.id if submission is not None else None,
        },
        torch_config=TorchConfig(
            backend="nccl" if parallel.use_gpu else "gloo", timeout_s=parallel.timeout_seconds
        ),
        scaling_config=ScalingConfig(
            num_workers=(parallel.min_workers, parallel.max_workers),  # ty: ignore
            use_gpu=parallel.use_gpu,
            resources_per_worker={"CPU": parallel.cpus_per_worker}
            | ({"GPU": 1} if parallel.use_gpu else {})
            | parallel.resources,
        ),
        run_config=RunConfig(
            name="ray_train",
            # Our checkpoints are not Ray Train's: it keeps nothing there that is needed again.
            storage_path=scratch,
            logging_config=LoggingConfig(log_level="ERROR"),  # ty: ignore
        ),
    )


def _worker(arguments: dict[str, Any]) -> Ended:
    """What each Ray Train worker runs."""
    config = build_config(arguments["config"])
    keep_freed_memory()
    set_threads(config.parallel.cpus_per_worker)
    device = get_device() if config.parallel.use_gpu else torch.device("cpu")
    run = open_storage(config.train.run_uri, config.checkpoint.retry_seconds)
    context = ray.train.get_context()
    setup_logging(
        config.telemetry,
        run=config.train.name,
        rank=context.get_world_rank(),
        job=ray.get_runtime_context().get_job_id(),
        submission=arguments["submission"],
    )
    memory = _worker_memory(config.parallel, device, context.get_local_world_size())
    plan = plan_mesh(config, context.get_world_size(), memory)
    if context.get_world_rank() == 0:
        _logger.info("%s", describe(plan))
    mesh = build_mesh(plan.ep, device)
    data_dir = Path(arguments["data_dir"])
    if run.local is None:
        store = open_storage(config.train.storage, config.checkpoint.retry_seconds)
        data_dir = obtain(data_dir, arguments["data_digest"], store)
    is_first = context.get_world_rank() == 0
    with follow_run(config, run) if is_first else nullcontext() as track:
        report = (lambda _: None) if track is None else _reporter(config, arguments["submission"], track)
        return train(config, mesh, data_dir, report, lambda: fence(run, arguments["lease"]))


def _worker_memory(parallel: ParallelConfig, device: torch.device, local_world: int) -> int | None:
    """Bytes that planning counts on, equal on all ranks; they plan alike only if they know alike."""
    if parallel.memory_gib is not None:
        return int(parallel.memory_gib * 2**30)
    memory = torch.tensor(worker_memory(device, local_world) or 0, device=device)
    if dist.is_initialized():
        dist.all_reduce(memory, dist.ReduceOp.MIN)
    return int(memory) or None


def _reporter(
    config: Config, submission: str | None, track: Callable[[dict[str, Any]], None]
) -> Callable[[dict[str, Any]], None]:
    """What rank 0 does with each record. Ray Train is told nothing: it would take four a second.

    Args:
        submission: the job server's id of the job; None if it was not submitted.
        track: hands it to the trackers.
    """
    ray_metrics = RayMetrics()

    def report(metrics: dict[str, Any]) -> None:
        ray_metrics.send(training_samples(metrics, config))
        ray_metrics.send(submission_samples(config.train.name, submission))
        track(metrics)

    return report
