"""A real server in a process of its own, under malformed requests and half-open connections."""

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
    "serve.max_body_seconds=2",
]
MAX_CONNECTIONS = 24
MAX_BODY_BYTES = 200_000
# Of 10,000 requests; a leak of one connection's state would be more.
MAX_GROWTH_BYTES = 24 * 2**20
JSON = {"content-type": "application/json"}
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
    until(lambda: not [c for c in server.process.net_connections("tcp") if c.status != "LISTEN"])
    return server.process.num_fds(), server.process.num_threads()


def statuses(document: dict[str, Any], case: Case) -> set[int]:
    """What the document says of a route; of others, that there is none."""
    path = case.path.removeprefix("http://h").partition("?")[0]
    path = "/v1/models/{name}" if path.startswith("/v1/models/") else path
    if (case.method, path) == ("GET", "/openapi.json"):
        return {200, 400}
    route = document["paths"].get(path, {}).get(case.method.lower(), {"responses": (400, 404, 405)})
    return {int(status) for status in route["responses"]}


def check(document: dict[str, Any], case: Case, answer: Answer) -> None:
    """The answer must be as documented; none at all is one to what is no complete request."""
    said = f"{case} -> {answer}"[:3000]
    if answer.status is None:
        # A client that sends too much may lose the answer with the connection.
        assert case.end != "wait" or sum(map(len, case.pieces)) > MAX_BODY_BYTES, said
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


def test_malformed_requests(document: dict[str, Any], server: LocalServer) -> None:
    attack(document, server, seed=0, count=300)
    before = settle(server)
    seen = attack(document, server, seed=1, count=1200)
    assert {case.partition(" ")[0] for case in seen} == {
        "fields",
        "schemas",
        "broken",
        "headers",
        "framing",
        "lines",
        "left",
    }
    assert settle(server) <= before


@pytest.mark.slow
def test_ten_thousand_malformed_requests(document: dict[str, Any], server: LocalServer) -> None:
    attack(document, server, seed=2, count=2000)
    before, held = settle(server), server.process.memory_info().rss
    attack(document, server, seed=3, count=10_000)
    assert settle(server) <= before
    assert server.process.memory_info().rss - held < MAX_GROWTH_BYTES


def test_half_open_connections(server: LocalServer) -> None:
    before = settle(server)
    good = json.dumps(BODIES["/v1/completions"]).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    whole = (head + b"\r\n") % len(good) + good
    beginnings = [b"", b"G", b"GET /healthz HTTP/1.1\r\nhost:", (head + b"\r\n") % 500, whole[:-1]]
    with contextlib.ExitStack() as stack:
        for beginning in beginnings * 30:
            half = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            half.sendall(beginning)
        assert httpx.post(f"{server.url}/v1/completions", content=good, headers=JSON).status_code == 200
        # The bodies that do not come are given up; the server waits for headers as long as uvicorn does.
        late = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        stack.enter_context(late)
        late.sendall(whole[:-1])
        assert late.recv(100).startswith(b"HTTP/1.1 408 ")
    assert settle(server) <= before


def test_clients_that_leave_streams_or_read_nothing(server: LocalServer) -> None:
    before = settle(server)
    body = BODIES["/v1/completions"] | {"max_tokens": 60, "stream": True, "n": 8}
    for _ in range(3):
        with contextlib.ExitStack() as stack:
            for _ in range(8):
                answer = stack.enter_context(httpx.stream("POST", f"{server.url}/v1/completions", json=body))
                assert answer.status_code == 200
            # Texts end though nobody reads them.
            until(lambda: not any(engine_holds(server).values()))
    assert settle(server) <= before
