"""With our settings HAProxy asks another server when one closes without an answer, as a killed replica does."""

import contextlib
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ingress import high_throughput
from tests.conftest import free_port
from tests.test_proxies import haproxy
from tests.waiting import until

BUFFER = 2**17
SETTINGS = """
global
    tune.bufsize {TUNE_BUFSIZE}
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    option redispatch 1
    retry-on {RETRY_ON}
    retries {RETRIES}
    balance roundrobin
frontend all
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    http-reuse always
    server broken 127.0.0.1:{broken}
    server good 127.0.0.1:{good}
"""


class Replica(socketserver.BaseRequestHandler):
    """Reads a body that ends with END, and answers unless it is broken."""

    def handle(self) -> None:
        received = b""
        while not received.endswith(b"END"):
            received += self.request.recv(65_536)
        if self.server.answers:
            self.request.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")


@contextlib.contextmanager
def replica(answers: bool) -> Iterator[int]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Replica) as server:
        server.answers, server.daemon_threads = answers, True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    port, config = free_port(), tmp_path / "haproxy.cfg"
    variables = high_throughput(tmp_path, haproxy())
    names = ("TUNE_BUFSIZE", "RETRY_ON", "RETRIES")
    settings = {name: variables[f"RAY_SERVE_HAPROXY_{name}"] for name in names}
    with replica(False) as broken, replica(True) as good:
        config.write_text(SETTINGS.format(port=port, broken=broken, good=good, **settings))
        with subprocess.Popen([haproxy(), "-db", "-f", str(config)], stderr=subprocess.DEVNULL) as process:
            try:
                until(lambda: is_open(port))
                yield port
            finally:
                process.kill()


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return not probe.connect_ex(("127.0.0.1", port))


def ask(port: int, size: int) -> int:
    """Status of a request whose body comes after its headers, as most clients send it."""
    head = f"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode())
        # A client that is slow; should it not be, the test only sees less.
        time.sleep(0.05)
        connection.sendall(b"x" * (size - 3) + b"END")
        return int(connection.recv(1000)[9:12])


def test_what_a_buffer_holds_is_repeated(port: int) -> None:
    assert {ask(port, size) for size in (100, 100, BUFFER - 10_000, BUFFER - 10_000)} == {200}
    assert {ask(port, 2 * BUFFER) for _ in range(4)} == {200, 502}
