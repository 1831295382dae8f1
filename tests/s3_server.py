"""A real S3 server on this machine, behind a network that can be broken."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_ray.training.chaos.proxy import Proxy

_BUCKET = "runs"
_CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "not-a-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_PORTS = ("master.port", "volume.port", "filer.port", "s3.port")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class S3Server:
    """A running server.

    Attributes:
        port: its own.
        proxy: the network in front of it; a test that breaks it mends it.
    """

    port: int
    proxy: Proxy

    def uri(self, prefix: str) -> str:
        """A folder in its bucket, reached through `proxy`."""
        server = f"endpoint_override=127.0.0.1:{self.proxy.port}&scheme=http&region=us-east-1"
        return f"s3://{_BUCKET}/{prefix}?{server}"

    def fresh_uri(self) -> str:
        """A folder that nothing else uses."""
        return self.uri(f"tests/{uuid.uuid4().hex}")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server, whose credentials are in the environment for as long as it runs."""
    with ExitStack() as stack:
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for key, value in _CREDENTIALS.items():
            environment.setenv(key, value)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-", ignore_cleanup_errors=True)))
        process, port = _start(folder)
        # It would take half a minute to end by itself.
        stack.callback(process.wait)
        stack.callback(process.kill)
        _wait_until_ready(process, port, folder)
        yield S3Server(port, Proxy(("127.0.0.1", port)))


@pytest.fixture
def breakable_s3(s3: S3Server) -> Iterator[S3Server]:
    """The same server behind a network of its own: late bytes of another test's connections do not count."""
    breakable = S3Server(s3.port, Proxy(("127.0.0.1", s3.port)))
    yield breakable
    breakable.proxy.mend()


@pytest.fixture(params=["disk", "s3"])
def storage_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, once on a disk and once in the server."""
    return str(tmp_path / "run") if request.param == "disk" else request.getfixturevalue("s3").fresh_uri()


def _start(folder: Path) -> tuple[subprocess.Popen, int]:
    with ExitStack() as probes:
        sockets = {}
        for name in [*_PORTS, *(f"{name}.grpc" for name in _PORTS)]:
            sockets[name] = probes.enter_context(socket.socket())
            sockets[name].bind(("127.0.0.1", 0))
        ports = {name: probe.getsockname()[1] for name, probe in sockets.items()}
    command = [str(Path(sys.executable).with_name("weed")), "server", "-s3", f"-dir={folder}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-filer.localSocket={folder / 'filer.sock'}"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=1024", "-volume.max=0"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", *(f"-{name}={port}" for name, port in ports.items())]
    libc = ctypes.CDLL(None)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            env={**os.environ, **_CREDENTIALS},
            # It ends with the tests even if they are killed.
            preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    return process, ports["s3.port"]


def _wait_until_ready(process: subprocess.Popen, port: int, folder: Path) -> None:
    from pyarrow.fs import S3FileSystem

    client = S3FileSystem(
        endpoint_override=f"127.0.0.1:{port}", scheme="http", region="us-east-1", allow_bucket_creation=True
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            client.create_dir(_BUCKET)
            with client.open_output_stream(f"{_BUCKET}/ready") as file:
                file.write(b"yes")
            client.delete_file(f"{_BUCKET}/ready")
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the S3 server did not start:\n{(folder / 'log').read_text()[-3000:]}")
            time.sleep(0.1)
