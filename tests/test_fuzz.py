"""A real server in a process of its own, under a schema fuzzer, malformed requests and half-open connections."""

import asyncio
import collections
import contextlib
import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from local_server import LocalServer, running

from moe_ray.serving.openai.errors import ErrorBody
from tests.chat_model import NAME, write_chat_folder
from tests.conftest import free_port
from tests.malformed import BODIES, Answer, Case, cases, send
from tests.waiting import until

SETTINGS = [
    "serve.max_batch_size=8",
    "serve.max_queued_requests=200",
    "serve.max_context=64",
    "serve.max_body_bytes=200000",
    "serve.cpus_per_replica=1",
]
MAX_CONNECTIONS = 24
# What uvicorn says itself, before the application: to what is no HTTP, and to what would be a WebSocket.
BELOW = (b"Invalid HTTP request received.", b"Failed to open a WebSocket", b"")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("fuzz")
    with running(write_chat_folder(folder / NAME), free_port(), folder / "log", SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def document(server: LocalServer) -> dict[str, Any]:
    return httpx.get(f"{server.url}/openapi.json").json()


def engine_holds(server: LocalServer) -> dict[str, float]:
    """Running and waiting requests and used blocks."""
    text = httpx.get(f"{server.url}/metrics").text
    found = re.findall(r"^moe_serve_(running|waiting|blocks_used)\{.*\} (.*)$", text, re.MULTILINE)
    assert len(found) == 3
    return {name: float(value) for name, value in found}


def settle(server: LocalServer) -> tuple[int, int]:
    """Wait until nothing runs and no connection is open; returns file descriptors and threads."""
    until(lambda: not any(engine_holds(server).values()))
    until(lambda: not [c for c in server.process.net_connections("tcp") if c.status == "ESTABLISHED"])
    return server.process.num_fds(), server.process.num_threads()


def statuses(document: dict[str, Any], case: Case) -> set[int]:
    """What the document says of a route; of others, that there is none."""
    path = case.path.partition("?")[0]
    path = "/v1/models/{name}" if path.startswith("/v1/models/") else path
    if (case.method, path) == ("GET", "/openapi.json"):
        return {200, 400}
    route = document["paths"].get(path, {}).get(case.method.lower(), {"responses": (400, 404, 405)})
    return {int(status) for status in route["responses"]}


def check(document: dict[str, Any], case: Case, answer: Answer) -> None:
    """The answer must be as documented; none at all is one to what is no complete request."""
    said = f"{case} -> {answer}"[:3000]
    if answer.status is None:
        assert case.end != "wait", said
        return
    if answer.headers.get("content-type", "").startswith("text/plain") and answer.status >= 400:
        assert case.kind in ("headers", "framing", "lines"), said
        assert answer.body.startswith(BELOW), said
        return
    assert answer.status != 500, said
    assert answer.status in statuses(document, case) | ({404, 405} if case.kind == "lines" else set()), said
    if answer.status >= 400 and case.method != "HEAD":
        assert "Fix: " in ErrorBody.model_validate_json(answer.body).error.message, said


async def send_all(document: dict[str, Any], server: LocalServer, drawn: list[Case]) -> collections.Counter[str]:
    """Send all, some at a time."""
    seen: collections.Counter[str] = collections.Counter()
    waiting = iter(drawn)

    async def client() -> None:
        for case in waiting:
            answer = await send(case, server.port)
            check(document, case, answer)
            seen[f"{case.kind} {answer.status}"] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(MAX_CONNECTIONS):
            group.create_task(client())
    return seen


def attack(document: dict[str, Any], server: LocalServer, seed: int, count: int) -> collections.Counter[str]:
    seen = asyncio.run(send_all(document, server, list(cases(seed, count))))
    assert sum(seen.values()) == count
    return seen
