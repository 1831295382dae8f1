"""How many replicas run, and how many requests each takes."""

import warnings
from dataclasses import asdict

from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from moe_ray.serve_config import ServeConfig
from moe_ray.serving.scaling import QueuePolicy, Rule

# How often replicas report.
_REPORT_SECONDS = 0.5


def make_autoscaling_config(config: ServeConfig) -> AutoscalingConfig:
    """Scale on the requests and tokens that replicas hold, which they tell by `record_autoscaling_stats`."""
    rule = Rule(
        least=config.min_replicas,
        most=config.max_replicas,
        requests=config.target_ongoing_requests,
        queued_tokens=config.target_queued_tokens,
        down_seconds=config.scale_down_seconds,
    )
    policy = f"{QueuePolicy.__module__}:{QueuePolicy.__name__}"
    with warnings.catch_warnings():
        # Deprecated, but the environment variables that should replace it are never read (Ray 2.60).
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            target_ongoing_requests=config.target_ongoing_requests,
            metrics_interval_s=_REPORT_SECONDS,
            look_back_period_s=config.load_average_seconds,
            # Delays are the policy's.
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=AutoscalingPolicy(policy_function=policy, policy_kwargs=asdict(rule)),
        )


def max_ongoing_requests(config: ServeConfig) -> int:
    """Requests that Serve sends to one replica at a time: twice those that the application lets in.

    Serve refuses in plain text what is above, so the application refuses first.
    """
    return 2 * config.max_http_requests
