"""Requests that no client should send, drawn with a seed, and what a server makes of them over a raw socket."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import h11

from tests.chat_model import NAME

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": NAME, "prompt": "the cat", "max_tokens": 2},
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    "/v1/embeddings": {"model": NAME, "input": ["the cat", "on"]},
    "/v1/routing": {"model": NAME, "input": "the cat"},
}
PATHS = [*BODIES, "/v1/models", f"/v1/models/{NAME}", "/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/no"]
_FIELDS = [
    "model",
    "prompt",
    "messages",
    "input",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "best_of",
    "seed",
    "stop",
    "logprobs",
    "top_logprobs",
    "echo",
    "stream",
    "stream_options",
    "suffix",
    "user",
    "logit_bias",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "priority",
    "timeout",
    "response_format",
    "chat_template_kwargs",
    "metadata",
    "tools",
    "tool_choice",
    "encoding_format",
    "dimensions",
    "modalities",
    "audio",
    "store",
    "unknown",
]
_SECONDS = 60


@dataclass(frozen=True)
class Case:
    """One connection.

    Attributes:
        pieces: what is sent, one write each.
        end: wait for the answer; send no more first; or just leave.
    """

    kind: str
    method: str
    path: str
    pieces: tuple[bytes, ...]
    end: Literal["wait", "half", "leave"] = "wait"


@dataclass(frozen=True)
class Raw:
    """JSON, or nearly so, that goes into a body as it is."""

    text: str


@dataclass(frozen=True)
class Answer:
    """What came back; status None: nothing, or no HTTP."""

    status: int | None
    headers: dict[str, str]
    body: bytes


def cases(seed: int, count: int) -> Iterator[Case]:
    """Draw connections of all kinds."""
    rng = random.Random(seed)
    for _ in range(count):
        (draw,) = rng.choices(list(_KINDS), list(_KINDS.values()))
        yield draw(rng)


async def send(case: Case, port: int) -> Answer:
    """Send one and read the answer to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        # The server may answer and close before it has read all.
        async with asyncio.timeout(_SECONDS) as limit:
            for piece in case.pieces:
                writer.write(piece)
                await writer.drain()
            if case.end == "leave":
                return Answer(None, {}, b"")
            if case.end == "half" and not writer.is_closing():
                writer.write_eof()
            return await _read(reader, case.method)
    except (OSError, h11.RemoteProtocolError):
        assert not limit.expired(), f"no answer to {case}"
        return Answer(None, {}, b"")
    finally:
        writer.close()


async def _read(reader: asyncio.StreamReader, method: str) -> Answer:
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="HEAD" if method == "HEAD" else "GET", target="/", headers=[("host", "a")]))
    client.send(h11.EndOfMessage())
    status, headers, body = None, {}, b""
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            client.receive_data(await reader.read(2**16))
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode(): value.decode("latin-1") for name, value in event.headers}
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            return Answer(status, headers, body)
        elif isinstance(event, h11.ConnectionClosed):
            return Answer(None, {}, b"")


def _head(method: str, path: str, *lines: str, length: int | None = None) -> bytes:
    sized = () if length is None else (f"content-length: {length}",)
    every = ("host: localhost", "connection: close")
    return "\r\n".join([f"{method} {path} HTTP/1.1", *every, *lines, *sized, "", ""]).encode("latin-1", "replace")


def _post(kind: str, path: str, body: bytes, *lines: str) -> Case:
    head = _head("POST", path, *(lines or ("content-type: application/json",)), length=len(body))
    return Case(kind, "POST", path, (head + body,))


def _dump(value: Any) -> bytes:
    raws: list[str] = []

    def mark(item: Any) -> Any:
        if isinstance(item, Raw):
            raws.append(item.text)
            return f"@{len(raws) - 1}@"
        if isinstance(item, dict):
            return {key: mark(each) for key, each in item.items()}
        return [mark(each) for each in item] if isinstance(item, list) else item

    text = json.dumps(mark(value))
    for index, raw in enumerate(raws):
        text = text.replace(f'"@{index}@"', raw)
    return text.encode()


def _nested(rng: random.Random) -> Raw:
    depth = rng.choice([3, 90, rng.randint(200, 1100), 20_000])
    opening, closing = rng.choice([("[", "]"), ('{"a":', "}")])
    return Raw(opening * depth + "1" + closing * depth)


def _value(rng: random.Random) -> Any:
    """Of the wrong type, out of range, or right by chance."""
    number = rng.choice([0, -1, 1, 2, 128, 129, 2**31, 2**63, -(2**63) - 1, 10**30, 1e308, -0.0, 0.5, 1e-320])
    text = rng.choice(["", "a", "\ud800", "\x00", "é" * 500, "x" * 70_000, "<|im_end|>", "🙂\ufffe\u202e", NAME])
    return rng.choice(
        [
            None,
            rng.random() < 0.5,
            number,
            number,
            text,
            text,
            Raw(rng.choice(["NaN", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 400, "01", "+1", "1.", ".5"])),
            [],
            {},
            [text] * rng.choice([1, 3, 5, 200]),
            [number] * rng.choice([1, 100, 600]),
            [[number, 1], [2]],
            [[[1]]],
            [text, number],
            {text: number},
            {str(number): rng.choice([-101, 100, 5])},
            {str(i): 1 for i in range(rng.choice([3, 1500]))},
            {"type": "json_schema", "json_schema": {"name": "x", "schema": _schema(rng)}},
            [{"role": rng.choice(["user", "assistant", "tool", text]), "content": text}] * rng.choice([1, 40]),
            _nested(rng),
        ]
    )


def _schema(rng: random.Random) -> Any:
    pattern = rng.choice(
        [
            "(a+)+$",
            "(a|a?){50}b",
            "((a{1,500}){1,500}){1,500}",
            "(",
            "\\p{L}{9999}",
            "(?=x)",
            "[^\\x00-\\uffff]",
            ".",
        ]
    )
    schema: Any = rng.choice(
        [
            {"type": "string", "pattern": pattern},
            {"type": "string", "minLength": 10**9, "maxLength": rng.choice([-1, 10**10])},
            {"type": "array", "minItems": 10**8, "items": {"type": "integer"}},
            {"$ref": rng.choice(["#", "#/$defs/no", "http://localhost/x", "#/%zz", 5])},
            {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
            {"enum": list(range(rng.choice([0, 3, 5000])))},
            {"anyOf": [{"type": "string", "pattern": f"{pattern}{i}"} for i in range(rng.choice([1, 40]))]},
            {"allOf": [{"type": "string"}, {"type": "number"}]},
            {"type": "number", "multipleOf": rng.choice([0, 1e-300, 7]), "maximum": Raw("1e999")},
            {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(rng.choice([1, 800]))}},
            {"type": "object", "patternProperties": {pattern: {}}, "minProperties": 5},
            {"type": rng.choice(["nothing", ["null", "null"], {}]), "format": "\ud800"},
            {"not": {}},
            _nested(rng),
            rng.choice([True, [], "x"]),
        ]
    )
    return {"type": "object", "properties": {"x": schema}, "required": ["x"]} if rng.random() < 0.3 else schema


def _fields(rng: random.Random) -> Case:
    path = rng.choice(list(BODIES))
    body = dict(BODIES[path])
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        body[rng.choice(_FIELDS)] = _value(rng)
    return _post("fields", path, _dump(body))


def _schemas(rng: random.Random) -> Case:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": _schema(rng)}}
    body = BODIES["/v1/chat/completions"] | {"response_format": form, "stream": rng.random() < 0.3}
    return _post("schemas", "/v1/chat/completions", _dump(body))


def _broken(rng: random.Random) -> Case:
    path = rng.choice(list(BODIES))
    body = _dump(BODIES[path])
    at = rng.randrange(len(body))
    changed = [
        body[:at],
        body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :],
        body[:at] + rng.choice([b"\xff", b"\xed\xa0\x80", b"\x00", b"\\u", b"\xf8\x88"]) + body[at:],
        b"\xef\xbb\xbf" + body,
        body.decode().encode(rng.choice(["utf-16", "utf-32"])),
        body * 2,
        body[:-1] + b', "model": "x"}',
        rng.choice([b"", b"null", b"[]", b"[" * 60_000, b'{"a":' * 20_000, b" " * 300_000]),
        rng.randbytes(rng.randrange(200)),
    ]
    return _post("broken", path, rng.choice(changed))


def _headers(rng: random.Random) -> Case:
    path = rng.choice(PATHS)
    method = "POST" if path in BODIES else "GET"
    json_type = "content-type: application/json"
    lines = rng.choice(
        [
            ["content-type: text/plain"],
            ["content-type: application/json; charset=\xff"],
            [json_type, "content-type: text/plain"],
            [json_type, "host: other"],
            [json_type, f"x-request-id: {rng.choice(['', ' ', 'a b', 'x' * 101, 'é', '%0d%0a', 'good-1'])}"],
            [json_type, "x-request-id: a", "x-request-id: b b"],
            [json_type, f"x-large: {'a' * rng.choice([9_000, 100_000])}"],
            [json_type, *(f"x-{i}: {i}" for i in range(1500))],
            [json_type, rng.choice(["no colon", ": empty", "a\x00b: c", " folded: x", "x: \x01", "x : y"])],
            [json_type, f"authorization: {rng.choice(['Bearer', 'Bearer é', 'Basic x', 'Bearer ' + 'x' * 9000])}"],
            [json_type, "expect: 100-continue"],
            [json_type, "accept-encoding: gzip", "content-encoding: gzip"],
            ["upgrade: websocket", "connection: upgrade", "sec-websocket-key: x", "sec-websocket-version: 13"],
            ["upgrade: h2c", "connection: upgrade, http2-settings"],
        ]
    )
    body = _dump(BODIES[path]) if path in BODIES else b""
    head = _head(method, path, *lines, length=len(body))
    if rng.random() < 0.3:
        host = rng.choice(["[::1", "a b", "", "%00", "x:99999999", "x:y", "\xff", "a" * 5000, "user@x", "//"])
        head = head.replace(b"host: localhost", f"host: {host}".encode("latin-1"))
    return Case("headers", method, path, (head + body,), "half" if b"upgrade" in head else "wait")


def _framing(rng: random.Random) -> Case:
    path = rng.choice(list(BODIES))
    body = _dump(BODIES[path])
    chunked, json_type = "transfer-encoding: chunked", "content-type: application/json"
    good = b"%x\r\n%s\r\n" % (len(body), body)
    chunks = rng.choice(
        [good, good + b"zz\r\n", good[:-5], b"ffffffffffffffff\r\n", b"-1\r\n", good * 3, b"0;x=" * 99]
    )
    length = rng.choice(
        ["0", "5", "-1", "+9", "1_0", "abc", "9" * 30, "4000001", str(len(body) + 9), f"{len(body)}, 3"]
    )
    head, sent = rng.choice(
        [
            (_head("POST", path, json_type, chunked), chunks),
            (_head("POST", path, json_type, chunked), good + b"0\r\n\r\n"),
            (_head("POST", path, json_type, f"content-length: {length}"), body),
            (_head("POST", path, json_type, chunked, length=len(body)), good + b"0\r\n\r\n"),
            (_head("POST", path, json_type, "content-length: 5", length=len(body)), body),
            (_head("POST", path, json_type, "transfer-encoding: gzip, chunked"), good),
            (_head("POST", path, json_type), body),
        ]
    )
    cut = rng.randrange(len(sent) + 1)
    end: Any = rng.choice(["half", "half", "leave"])
    return Case("framing", "POST", path, (head, sent[:cut], sent[cut:]), end)


def _lines(rng: random.Random) -> Case:
    method = rng.choice(
        [
            "GET",
            "HEAD",
            "POST",
            "PUT",
            "PATCH",
            "DELETE",
            "OPTIONS",
            "TRACE",
            "CONNECT",
            "PROPFIND",
            "BREW",
            "get",
            "é",
        ]
    )
    path = rng.choice(PATHS)
    odd = ["*", "", "x", "//", "/../etc/passwd", "/%00", "/%ff%fe", "/%", "/v1/models/" + "%2F" * 900]
    odd += [
        "/" + "a" * 60_000,
        "http://[::1/x",
        "http://h/v1/models",
        "/v1/models?" + "a=b&" * 5000,
        "/é",
        "/v1/models/",
    ]
    path = rng.choice([path, path, *odd, f"{path}/", f"{path}?x=%zz", path.upper()])
    data = _head(method, path)
    data = rng.choice(
        [
            data,
            data,
            data,
            data.replace(b"1.1", rng.choice([b"0.9", b"1.0", b"2.0", b"9" * 9])),
            data * 3,
            data[:-9],
        ]
    )
    if rng.random() < 0.1:
        data = rng.choice(
            [rng.randbytes(300), b"\x16\x03\x01\x02\x00\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n" * 9]
        )
    return Case("lines", method, path, (data,), rng.choice(["half", "half", "leave"]))


def _left(rng: random.Random) -> Case:
    """Good ones, of which most clients leave before the answer is complete."""
    path = rng.choice(["/v1/completions", "/v1/chat/completions"])
    body = BODIES[path] | {
        "stream": rng.random() < 0.8,
        "max_tokens": rng.choice([1, 3, 40]),
        "n": rng.choice([1, 4]),
    }
    case = _post("left", path, _dump(body))
    return Case("left", "POST", path, case.pieces, rng.choice(["leave", "leave", "wait"]))


_KINDS: dict[Callable[[random.Random], Case], int] = {
    _fields: 34,
    _schemas: 12,
    _broken: 12,
    _headers: 12,
    _framing: 12,
    _lines: 12,
    _left: 6,
}
