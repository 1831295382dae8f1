"""Keys, limits, request ids, audit log, metrics and deadlines, over a real HTTP server in the test process."""

import json

import httpx
import pytest

from moe_ray.errors import ConfigError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.access import open_access
from moe_ray.serving.api_keys import load_keys, make_key
from tests.chat_model import NAME, load_chat_model, served, write_chat_folder

BODY = {"model": NAME, "prompt": "the cat", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_chat_model(write_chat_folder(tmp_path_factory.mktemp("hf") / NAME))


@pytest.fixture
def guarded(model, tmp_path):
    """A client, the keys by name, and the audit log."""
    made = {name: make_key(name) for name in ("free", "few", "short")}
    limits = {"free": "", "few": " 2", "short": " 1000 3"}
    file = tmp_path / "keys"
    file.write_text("# ours\n\n" + "\n".join(line + limits[name] for name, (_, line) in made.items()))
    file.chmod(0o600)
    log = tmp_path / "audit"
    config = ServeConfig(api_keys_file=str(file), audit_log=str(log))
    access = open_access(config, "r1", lambda: 1)
    with served(model, config, access) as url, httpx.Client(base_url=url, timeout=60) as http:
        yield http, {name: {"authorization": f"Bearer {key}"} for name, (key, _) in made.items()}, log


def test_guard(guarded):
    http, keys, log = guarded
    for path in ("/v1/models", "/v1/nothing", "/metrics"):
        refused = http.get(path, headers={"authorization": "Bearer moe-wrong"})
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for path in ("/healthz", "/readyz", "/openapi.json"):
        assert http.get(path).status_code == 200
    answer = http.post("/v1/completions", json=BODY, headers=keys["free"] | {"x-request-id": "mine.1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine.1")
    assert http.get("/healthz", headers={"x-request-id": "a b"}).status_code == 400
    statuses = [http.get("/v1/models", headers=keys["few"]) for _ in range(3)]
    assert [answer.status_code for answer in statuses] == [200, 200, 429]
    assert 1 <= int(statuses[-1].headers["retry-after"]) <= 30
    both = [http.post("/v1/completions", json=BODY, headers=keys["short"]).status_code for _ in range(2)]
    assert both == [200, 429]
    late = http.post("/v1/completions", json=BODY | {"timeout": 1e-6}, headers=keys["free"])
    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    text = http.get("/metrics", headers=keys["free"]).text
    assert 'moe_serve_key_tokens_total{key="free",kind="completion",replica="r1"} 4.0' in text
    assert 'moe_serve_running{replica="r1"} 0.0' in text
    line = next(line for line in map(json.loads, log.read_text().splitlines()) if line["request_id"] == "mine.1")
    assert (line["key"], line["route"], line["status"]) == ("free", "/v1/completions", "200")
    assert line["completion_tokens"] == 4
    assert "prompt" not in line
    assert log.stat().st_mode & 0o77 == 0


def test_key_files_that_are_refused(tmp_path, monkeypatch):
    _, line = make_key("a")
    file = tmp_path / "keys"
    for text, mode in (("", 0o600), ("a secret", 0o600), (f"{line}\n{line}", 0o600), (line, 0o644)):
        file.write_text(text)
        file.chmod(mode)
        with pytest.raises(ConfigError) as caught:
            load_keys(str(file))
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("MOE_RAY_API_KEYS", f"{line} 5;")
    assert [(key.name, key.requests_per_minute) for key in load_keys(None)] == [("a", 5)]
