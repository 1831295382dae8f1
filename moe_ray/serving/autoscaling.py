"""How many replicas run."""

import warnings

from ray.serve.config import AutoscalingConfig

from moe_ray.serve_config import ServeConfig

# Requests that a replica accepts on top of what its engine holds, so that the engine's own refusal, in
# OpenAI's format, comes before Serve holds requests back.
_SPARE_REQUESTS = 64


def make_autoscaling_config(config: ServeConfig) -> AutoscalingConfig:
    """Scale on ongoing requests: up within seconds, down once the load has been gone for a while."""
    with warnings.catch_warnings():
        # Deprecated, but the environment variables that should replace it are never read (Ray 2.60).
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
            metrics_interval_s=0.5,
            look_back_period_s=2.0,
            upscale_delay_s=1.0,
            downscale_delay_s=30.0,
        )


def max_ongoing_requests(config: ServeConfig) -> int:
    """Requests that Serve sends to one replica at a time."""
    return config.max_batch_size + config.max_queued_requests + _SPARE_REQUESTS
