"""The Ray Serve deployment: one replica is one engine and its own HTTP ingress."""

import gc
import logging
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from moe_ray.config import TelemetryConfig
from moe_ray.cpu import keep_freed_memory, set_threads
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.access import open_access
from moe_ray.serving.affinity.directory import directory_config
from moe_ray.serving.affinity.join import Membership
from moe_ray.serving.affinity.stats import AffinityStats
from moe_ray.serving.app import make_app
from moe_ray.serving.autoscaling import make_autoscaling_config, max_ongoing_requests
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.follow import Follower
from moe_ray.serving.load_to_serve import load_to_serve
from moe_ray.serving.ray_reporter import RayReporter
from moe_ray.serving.replica_count import ReplicaCount
from moe_ray.serving.usage import request_fields
from moe_ray.telemetry.logs import setup_logging

_logger = logging.getLogger(__name__)


@serve.ingress()
class LanguageModel:
    """Loads a checkpoint and answers the routes of `serving.app` with it."""

    def __init__(self, checkpoint: str, config: ServeConfig, telemetry: TelemetryConfig) -> None:
        # Before the model, which takes longer. Serve adds the request id to all answers.
        replica = serve.get_replica_context().replica_tag
        setup_logging(telemetry, request_fields, replica=replica, job=ray.get_runtime_context().get_job_id())
        count = ReplicaCount(config.max_replicas)
        self._config, self._replica = config, replica
        self._membership: Membership | None = None
        self._affinity = AffinityStats()
        self._access = open_access(config, replica, count, answers_id=False, counts=(self._affinity,))
        if any(key.requests_per_minute or key.tokens_per_minute for key in self._access.keys):
            count.start()
        set_threads(config.cpus_per_replica)
        # Requests in flight are more objects than the default of 700: each burst would be searched for cycles.
        gc.set_threshold(20_000)

        def load(source: str) -> CompletionService:
            model = load_to_serve(source, config)
            # Not before: what loading frees goes back to the kernel.
            keep_freed_memory()
            return CompletionService(model, config)

        def make(service: CompletionService) -> FastAPI:
            return make_app(service, self._access)

        if config.follow:
            self._service = self._app = Follower(checkpoint, load, make, config.follow_poll_seconds)
        else:
            self._service = load(checkpoint)
            self._app = make(self._service)
        self._reporter = RayReporter(self._access.metrics)
        _logger.info("serving %s", checkpoint)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the constructor, in the event loop of requests."""
        if not self._config.prefix_routing:
            return self._app
        host, stats = ray.util.get_node_ip_address(), self._service.stats
        self._membership = Membership.begin(
            self._app, self._replica, host, self._config, self._access.keys, stats, self._affinity
        )
        return self._membership.app

    def check_health(self) -> None:
        """Called by Serve, which replaces the replica if this raises."""
        if not self._service.is_ready:
            raise RuntimeError("the engine has stopped")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, which hands it to the autoscaling policy."""
        stats = self._service.stats()
        return {"requests": float(stats.waiting + stats.running), "queued_tokens": float(stats.queued_tokens)}

    async def __del__(self) -> None:
        """Called by Serve when the replica shuts down."""
        membership: Membership | None = getattr(self, "_membership", None)
        if membership:
            await membership.end()
        if hasattr(self, "_reporter"):
            self._reporter.close()
        if hasattr(self, "_service"):
            self._service.close()


def make_application(checkpoint: str, config: ServeConfig, telemetry: TelemetryConfig) -> Application:
    """The Serve application of a checkpoint.

    Args:
        checkpoint: absolute path or address that every node can read; of a run if config.follow.
        telemetry: how replicas log.
    """
    return serve.deployment(name="LanguageModel", **deployment_options(config))(LanguageModel).bind(
        checkpoint, config, telemetry
    )


def deployment_options(config: ServeConfig) -> dict[str, Any]:
    """What Serve is told of the replicas."""
    return {
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        "autoscaling_config": make_autoscaling_config(config),
        "max_ongoing_requests": max_ongoing_requests(config),
        "graceful_shutdown_timeout_s": config.drain_seconds,
        "health_check_period_s": 2,
        "health_check_timeout_s": 30,
        # What a line in Serve's log says of each request is in the audit log and the metrics.
        "logging_config": LoggingConfig(enable_access_log=False),
        "deployment_actors": [directory_config()] if config.prefix_routing else [],
    }
