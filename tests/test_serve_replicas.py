"""Two replicas on real Ray Serve: keys, limits, audit log, metrics, and a run that goes on meanwhile."""

import json
import re

import httpx
import pytest

from moe_ray.serving.api_keys import make_key
from tests.conftest import free_port
from tests.test_follow import BODY, Run
from tests.waiting import until

pytestmark = pytest.mark.cluster
LIMIT = 8


@pytest.fixture(scope="module")
def endpoint(ray_cluster, tmp_path_factory):
    """The address, the run, the keys by name, and the audit log."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve_apps.moe_lm import build

    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    run = Run(folder)
    run.save(1)
    made = {name: make_key(name) for name in ("free", "few")}
    keys, log = folder / "keys", folder / "audit"
    keys.write_text(f"{made['free'][1]}\n{made['few'][1]} {LIMIT}\n")
    keys.chmod(0o600)
    settings = {
        "min_replicas": 2,
        "max_replicas": 2,
        "api_keys_file": keys,
        "audit_log": log,
        "follow": True,
        "follow_poll_seconds": 0.2,
    }
    args = {f"serve.{name}": str(value) for name, value in settings.items()}
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    try:
        serve.run(build({"checkpoint": str(run.path), **args}), name="moe_lm")
        headers = {name: {"authorization": f"Bearer {key}"} for name, (key, _) in made.items()}
        yield f"http://127.0.0.1:{port}", run, headers, log
    finally:
        serve.shutdown()


def test_guard(endpoint):
    url, _, keys, log = endpoint
    assert httpx.get(f"{url}/readyz").status_code == 200
    refused = httpx.post(f"{url}/v1/completions", json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    headers = keys["free"] | {"x-request-id": "mine"}
    answer = httpx.post(f"{url}/v1/completions", json=BODY, headers=headers, timeout=60)
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (200, ["mine"])
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["key"] for line in lines if line["request_id"] == "mine"] == ["free"]
    # Each replica grants its share, whichever the requests meet.
    answers = [httpx.get(f"{url}/v1/models", headers=keys["few"]) for _ in range(2 * LIMIT)]
    granted = [answer for answer in answers if answer.status_code == 200]
    assert LIMIT / 2 <= len(granted) <= LIMIT
    late = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in late} == {429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in late)
    replicas = set()

    def both_are_scraped():
        text = httpx.get(f"{url}/metrics", headers=keys["free"]).text
        replicas.update(re.findall(r'^moe_serve_running\{replica="(.+)"\}', text, re.MULTILINE))
        return len(replicas) == 2

    until(both_are_scraped)


def test_replicas_follow_the_run(endpoint):
    url, run, keys, _ = endpoint
    steps, texts = [], {}
    with httpx.Client(headers=keys["free"], timeout=60) as client:

        def ask():
            step = client.get(f"{url}/v1/models").json()["data"][0]["step"]
            answer = client.post(f"{url}/v1/completions", json=BODY)
            assert answer.status_code == 200
            steps.append(step)
            texts.setdefault(answer.json()["choices"][0]["text"], 0)
            return steps[-8:] == [2] * 8

        ask()
        assert steps == [1]
        run.save(2)
        until(ask)
    assert len(texts) == 2
