"""A server of the application's routes in a process of its own, run by uvicorn as Serve runs it.

Run `python benchmarks/local_server.py MODEL PORT [serve.max_batch_size=8 …]`, or use `running` in a program. The
server ends when its standard input does, and so with the program that started it.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import psutil
import uvicorn

from moe_ray.checkpoint.inference import resolve_source
from moe_ray.config import build_config
from moe_ray.cpu import keep_freed_memory, set_threads
from moe_ray.serving.access import open_access
from moe_ray.serving.app import make_app
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.load_to_serve import load_to_serve

_START_SECONDS = 120.0
# As Serve's proxy keeps idle connections.
_KEEP_ALIVE_SECONDS = 5


@dataclass(frozen=True)
class LocalServer:
    """A running server: `process` to look at, `url` to ask."""

    url: str
    port: int
    process: psutil.Process


@contextlib.contextmanager
def running(model: Path, port: int, log: Path, settings: Sequence[str] = ()) -> Generator[LocalServer]:
    """Serve a model until the end of the block.

    Args:
        log: file for what the server says.
        settings: such as `serve.max_batch_size=8`.

    Raises:
        RuntimeError: it did not start, or it ended before the block did.
    """
    with log.open("ab") as file:
        command = [sys.executable, __file__, str(model), str(port), *settings]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file)
    try:
        server = LocalServer(f"http://127.0.0.1:{port}", port, psutil.Process(child.pid))
        _await_ready(child, server.url, log)
        yield server
        if child.poll() is not None:
            raise RuntimeError(f"the server ended with {child.returncode}; see {log}")
    finally:
        _stop(child)


def _await_ready(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start; see {log}")


def _stop(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(30)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def serve(model: str, port: int, settings: list[str]) -> None:
    """Serve a model until standard input ends."""
    path, found = resolve_source(model)
    config = build_config(found.model_dump(mode="json"), settings).serve
    access = open_access(config, "local", lambda: 1)
    set_threads(config.cpus_per_replica)
    loaded = load_to_serve(path, config)
    keep_freed_memory()
    service = CompletionService(loaded, config)
    app = make_app(service, access)
    server = uvicorn.Server(
        uvicorn.Config(
            lambda: app,
            factory=True,
            host="127.0.0.1",
            port=port,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=5,
            lifespan="off",
            access_log=False,
            log_level=None,
            log_config=None,
        )
    )
    threading.Thread(target=_end_with, args=(sys.stdin.buffer, server), daemon=True).start()
    try:
        server.run()
    finally:
        service.close()


def _end_with(file: IO[bytes], server: uvicorn.Server) -> None:
    while os.read(file.fileno(), 1):
        pass
    server.should_exit = True


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
