"""The head node of a local cluster: its `ray start` command, its environment and whether it answers."""

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.nodes import ENVIRONMENT, NodePlan
from cluster.processes import MARKER, started_at

LOOPBACK = "127.0.0.1"
# Despite its name this switch works everywhere: the node's address is 127.0.0.1, so all its ports are local.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_BIN = Path(sys.executable).parent
# Where Ray's command line tools look by default.
_DASHBOARD_PORT = 8265
# In a shell or job that uses another cluster these point there and would mislead the head.
_FOREIGN = frozenset(
    {
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_DASHBOARD_ADDRESS",
        "RAY_AUTH_TOKEN",
        "RAY_JOB_ID",
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        "RAY_NAMESPACE",
        "RAY_RAYLET_PID",
        "RAY_REDIS_ADDRESS",
    }
)
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Head:
    """A head process and where it listens.

    Attributes:
        pid: the process from which all others of the cluster descend.
        started: when that process started, which tells it from a later one with the same id.
        temp_dir: Ray's sessions, sockets and logs; also the marker of all processes.
        num_cpus: CPUs that Ray may grant.
        proxy: what Serve answers through, "haproxy" or "plain".
        nodes: those that the autoscaler may start beside the head, in words; "" without an autoscaler.
    """

    pid: int
    started: float
    temp_dir: str
    num_cpus: int
    gcs_address: str
    dashboard_url: str
    agent_url: str
    metrics_url: str
    proxy: str = "plain"
    nodes: str = ""


def launch(
    temp_dir: Path,
    token_file: Path,
    log_file: Path,
    num_cpus: int,
    extra: Mapping[str, str],
    nodes: NodePlan | None = None,
) -> Head:
    """Start the head process. It is not ready yet: `await_ready` tells.

    Args:
        extra: variables of all processes of the cluster.
        nodes: what the autoscaler may start beside the head; None: no autoscaler.
    """
    dashboard = free_port(_DASHBOARD_PORT)
    gcs, client, agent, metrics, *others = free_ports(6)
    options = {
        "node-ip-address": LOOPBACK,
        "port": gcs,
        "ray-client-server-port": client,
        "dashboard-host": LOOPBACK,
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent,
        "metrics-export-port": metrics,
        # 0 lets Ray choose.
        "dashboard-agent-grpc-port": 0,
        "runtime-env-agent-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
        "temp-dir": temp_dir,
        "num-cpus": num_cpus,
    }
    dashboard_url = f"http://{LOOPBACK}:{dashboard}"
    environment = {**_environment(temp_dir, token_file, dashboard_url, *others), **extra}
    if nodes is not None:
        environment |= ENVIRONMENT
        options["autoscaling-config"] = temp_dir / "autoscaling.json"
        nodes.write(temp_dir / "autoscaling.json", f"{LOOPBACK}:{gcs}")
    pid = _spawn([f"--{name}={value}" for name, value in options.items()], environment, log_file)
    return Head(
        pid=pid,
        started=started_at(pid) or 0.0,
        temp_dir=str(temp_dir),
        num_cpus=num_cpus,
        gcs_address=f"{LOOPBACK}:{gcs}",
        dashboard_url=dashboard_url,
        agent_url=f"http://{LOOPBACK}:{agent}",
        metrics_url=f"http://{LOOPBACK}:{metrics}/metrics",
        proxy="haproxy" if extra.get("RAY_SERVE_ENABLE_HA_PROXY") else "plain",
        nodes="" if nodes is None else str(nodes),
    )


def _environment(
    temp_dir: Path, token_file: Path, dashboard_url: str, autoscaler_port: int, dashboard_metrics_port: int
) -> dict[str, str]:
    """What the head and, through it, all processes of the cluster get."""
    inherited = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    return {
        **inherited,
        **authentication(token_file),
        **LOOPBACK_ONLY,
        MARKER: str(temp_dir),
        # The entry point `python` of a job is the one that runs this.
        "PATH": os.pathsep.join([str(_BIN), os.environ.get("PATH", os.defpath)]),
        # Ray Train's own actors look for the dashboard, and would find that of any Ray on this machine.
        "RAY_API_SERVER_ADDRESS": dashboard_url,
        "AUTOSCALER_METRIC_PORT": str(autoscaler_port),
        "DASHBOARD_METRIC_PORT": str(dashboard_metrics_port),
        # `ray job stop` gives training the time to write a checkpoint.
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        # There is no other node that requests could move to before this one stops.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }


def _spawn(flags: list[str], environment: dict[str, str], log_file: Path) -> int:
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [str(_BIN / "ray"), "start", "--head", "--block", "--disable-usage-stats", *flags],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is for the command that runs there.
            start_new_session=True,
        )
    return process.pid


def await_ready(head: Head, token: str, seconds: float) -> bool:
    """Wait until jobs can be submitted; False if the head ends or time runs out before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and started_at(head.pid) is not None:
        if is_ready(head, token):
            return True
        time.sleep(0.2)
    return False


def is_ready(head: Head, token: str) -> bool:
    """Whether the dashboard, and the node's agent that starts jobs, answer."""
    try:
        fetch(f"{head.dashboard_url}/api/version", token)
        fetch(f"{head.agent_url}/api/local_raylet_healthz", token)
    except OSError:
        return False
    return True


def fetch(url: str, token: str, seconds: float = 10.0) -> bytes:
    """Body of a GET request to the cluster; past any proxy that the environment sets.

    Raises:
        OSError: no answer, or one that is no success.
    """
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with _opener.open(request, timeout=seconds) as response:
        return response.read()


def authentication(token_file: Path) -> dict[str, str]:
    """Variables with which Ray's processes and clients authenticate each other."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def free_port(preferred: int) -> int:
    """The preferred TCP port if nothing listens there, else any free one."""
    return preferred if _is_free(preferred) else free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Free ports below those that the system gives to outgoing connections, so that they stay free for a while."""
    found: set[int] = set()
    while len(found) < count:
        port = 20_000 + secrets.randbelow(12_000)
        if _is_free(port):
            found.add(port)
    return list(found)


def _is_free(port: int) -> bool:
    with socket.socket() as candidate:
        # As servers do: a connection that was closed a minute ago does not block the port.
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind((LOOPBACK, port))
        except OSError:
            return False
        return True
