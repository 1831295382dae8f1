"""Shared fixtures. Importing this module keeps tests away from other Ray clusters of the user."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.s3_server import breakable_s3, s3, storage_uri  # noqa: F401

# Read when ray is first imported or started: without them a local Ray would use, or leave, a token in the
# home folder, or join a cluster that RAY_ADDRESS names.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)
# Workers of pytest-xdist and the background of a shell ignore it, and so would what tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and on a busy machine waiting for them takes minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class RayCluster:
    """A running cluster: `address` for `ray.init` or RAY_ADDRESS, `dashboard` for the job API,
    `temp_dir` for the files that Ray writes."""

    address: str
    dashboard: str
    temp_dir: Path


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A local Ray with 16 logical CPUs and a dashboard, to which the test process is connected.

    Its processes are children of the test process and end with it, even if that is killed.
    """
    import ray

    # Unix sockets live in it, whose paths hold at most 107 characters.
    temp_dir = tempfile.mkdtemp(prefix="mr-", dir="/tmp")
    port = free_port()
    try:
        context = ray.init(
            address="local",
            num_cpus=16,
            num_gpus=0,
            object_store_memory=200_000_000,
            include_dashboard=True,
            dashboard_port=port,
            _node_ip_address="127.0.0.1",
            _temp_dir=temp_dir,
            configure_logging=False,
            _system_config={"metrics_report_interval_ms": 1000},
        )
        yield RayCluster(context.address_info["gcs_address"], f"http://127.0.0.1:{port}", Path(temp_dir))
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)
