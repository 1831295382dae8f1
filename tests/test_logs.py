"""Log lines: their two forms, what they are about, repeats, and secrets that do not get into them."""

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from moe_ray.config import TelemetryConfig, build_config
from moe_ray.errors import ConfigError
from moe_ray.serving.access import Access, Observer
from moe_ray.serving.api_keys import make_key
from moe_ray.serving.app import ErrorBoundary
from moe_ray.serving.usage import request_fields
from moe_ray.telemetry.logs import set_log_fields, setup_logging
from moe_ray.telemetry.redact import Redactor

_logger = logging.getLogger("moe_ray.test")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    ours, root = logging.getLogger("moe_ray"), logging.getLogger()
    before = ours.handlers[:], ours.propagate, ours.level, root.level
    yield
    ours.handlers[:], ours.propagate = before[:2]
    ours.setLevel(before[2])
    root.setLevel(before[3])
    logging.getLogger("moe_ray.test").setLevel(logging.NOTSET)


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_text_names_what_a_line_is_about(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(TelemetryConfig(), lambda: {"request": "r-1"}, run="wiki", rank=0, job=None)
    set_log_fields(step=7)
    _logger.info("saved %d files", 3)
    _logger.debug("unseen")
    (line,) = said(capsys)
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d INFO moe_ray.test: saved 3 files \[run=wiki rank=0 step=7 request=r-1\]", line
    )


def test_json_lines_hold_the_same_and_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.time()
    setup_logging(TelemetryConfig(log_format="json"), lambda: {"request": None}, run="wiki", rank=1)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        _logger.exception('it "failed"')
    (line,) = said(capsys)
    record = json.loads(line)
    assert {name: record[name] for name in ("level", "logger", "message", "run", "rank")} == {
        "level": "error",
        "logger": "moe_ray.test",
        "message": 'it "failed"',
        "run": "wiki",
        "rank": 1,
    }
    assert "request" not in record
    assert record["traceback"].endswith("ValueError: two\nlines")
    assert record["time"][:17] in {time.strftime("%Y-%m-%dT%H:%M:", time.gmtime(t)) for t in (began, time.time())}


def test_levels_by_module(capsys: pytest.CaptureFixture[str]) -> None:
    config = build_config({}, ["telemetry.log_level=error", "telemetry.log_levels={moe_ray.test: debug}"])
    setup_logging(config.telemetry)
    logging.getLogger("moe_ray.other").warning("unseen")
    _logger.debug("seen")
    assert [line.rpartition(": ")[2] for line in said(capsys)] == ["seen"]
    with pytest.raises(ConfigError, match="names 'urllib3', which is no module of moe_ray"):
        build_config({}, ["telemetry.log_levels={urllib3: debug}"])
    with pytest.raises(
        ConfigError, match=r"telemetry.log_levels.moe_ray.test is mapping to debug\|info\|warning\|error"
    ):
        build_config({}, ["telemetry.log_levels={moe_ray.test: loud}"])


def test_repeats_are_left_out_and_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_logging(TelemetryConfig(log_format="json"))
    clock = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: clock)
    monkeypatch.setattr(time, "time", lambda: clock / 1e9)
    for attempt in range(12):
        _logger.warning("trying again, attempt %d", attempt)
    _logger.warning("something else")
    clock += 61 * 10**9
    _logger.warning("trying again, attempt %d", 12)
    records = [json.loads(line) for line in said(capsys)]
    texts = [record["message"] for record in records]
    assert texts == [
        *(f"trying again, attempt {n}" for n in range(5)),
        "something else",
        "trying again, attempt 12",
    ]
    assert [record.get("suppressed") for record in records] == [None] * 6 + [7]


def secret_lines() -> list[tuple[str, str]]:
    """A line, and what of it must not be seen."""
    secret = uuid.uuid4().hex
    key = make_key("somebody")[0]
    return [
        (f"s3://bucket/x?region=eu&secret_key={secret}&scheme=http", secret),
        (f"GET https://me:{secret}@host/path", secret),
        (f"https://b.s3.amazonaws.com/k?X-Amz-Signature={secret}&X-Amz-Date=1", secret),
        (f"https://b.s3.amazonaws.com/k?X-Amz-Security-Token={secret}&x=1", secret),
        (f'{{"api_key": "{secret}", "step": 3}}', secret),
        (f"headers Authorization: Bearer {secret}", secret),
        (f"WANDB_API_KEY={secret}", secret),
        (f"password = '{secret}'", secret),
        (json.dumps({"password": f"two words, {secret}"}), secret),
        (json.dumps(json.dumps({"password": f"two words, {secret}"})), secret),
        (f"http://me:p@ss@{secret}@host/path", secret),
        (f"s3://AKIA:ab/{secret}+c@bucket/path", secret),
        (f"the key {key} is unknown", key),
        ("id AKIAIOSFODNN7EXAMPLE was refused", "AKIAIOSFODNN7EXAMPLE"),
        (f"answered by {secret} of the environment", secret),
    ]


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_is_written(
    form: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for line, secret in secret_lines():
        if "of the environment" in line:
            monkeypatch.setenv("STORAGE_SECRET", secret)
        setup_logging(build_config({}, [f"telemetry.log_format={form}"]).telemetry)
        try:
            raise OSError(line)
        except OSError:
            _logger.exception("failed: %s", line)
        text = capsys.readouterr().err
        assert "***" in text, line
        assert secret not in text, line


def test_long_texts_are_looked_through_in_time() -> None:
    """Each of these took minutes, or hours, when words were tried from each of their letters."""
    redact = Redactor()
    for text in ("a-" * 50_000, "a" * 200_000, "token-" * 20_000, "a://" * 10_000):
        assert redact(text) == text


def test_what_is_no_secret_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(TelemetryConfig())
    lines = ["prompt_tokens=12, completion_tokens: 4", "s3://bucket/runs?region=eu", "rank 0 resumed from step 8"]
    lines += ["http://127.0.0.1:8000/mail@host"]
    for line in lines:
        _logger.info(line)
    assert [line.partition("moe_ray.test: ")[2] for line in said(capsys)] == lines


def test_lines_name_the_request_that_failed(capsys: pytest.CaptureFixture[str]) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise ArithmeticError

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Observer(ErrorBoundary(fail), Access()))
        async with httpx.AsyncClient(transport=transport, base_url="http://host") as client:
            return await client.get("/", headers={"x-request-id": "mine"})

    setup_logging(TelemetryConfig(log_format="json"), request_fields)
    assert asyncio.run(ask()).status_code == 500
    _logger.info("outside of it")
    failed, outside = [json.loads(line) for line in said(capsys)]
    assert (failed["request"], failed["traceback"][-15:]) == ("mine", "ArithmeticError")
    assert "request" not in outside
