"""Where the other replicas of an application reach this one: its routes on a port of its own."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Generator
from typing import Self

import uvicorn
from starlette.types import ASGIApp

# Longer than clients keep idle connections, so that they close them first.
_KEEP_ALIVE_SECONDS = 60


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are Ray's."""
        yield


class Listener:
    """A running server.

    Attributes:
        address: host:port.
    """

    def __init__(self, address: str, server: uvicorn.Server, task: asyncio.Task[None]) -> None:
        self.address = address
        self._server, self._task = server, task

    @classmethod
    def open(cls, app: ASGIApp, host: str) -> Self:
        """Serve an application on any free port of an address until `close`, in the running event loop."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family, backlog=1024)
        listening.setblocking(False)
        port = listening.getsockname()[1]
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        config = uvicorn.Config(
            lambda: app,
            factory=True,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            lifespan="off",
            access_log=False,
            log_config=None,
            log_level=None,
            # The listener of the replica that hands the answer on adds them.
            server_header=False,
            date_header=False,
        )
        server = _Server(config)
        task = asyncio.create_task(server.serve(sockets=[listening]))
        return cls(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", server, task)

    async def close(self) -> None:
        """Take no more requests, and finish those that are there."""
        self._server.should_exit = True
        await self._task
