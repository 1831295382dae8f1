"""The audit log and the limits of keys, over a real HTTP server in the test process."""

import collections
import contextlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from moe_ray.serve_config import ServeConfig
from moe_ray.serving.access import open_access
from moe_ray.serving.api_keys import make_key
from tests.chat_model import NAME, load_chat_model, served, write_chat_folder
from tests.waiting import until

BODY = {"model": NAME, "prompt": "the cat", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_chat_model(write_chat_folder(tmp_path_factory.mktemp("hf") / NAME))


@pytest.fixture
def ask(model):
    """Send requests to a server with these settings, and then look at what it left."""

    def ask(settings, *bodies, then=lambda url: None):
        with served(model, settings, open_access(settings, "r1", lambda: 1)) as url:
            statuses = [httpx.post(f"{url}/v1/completions", json=body).status_code for body in bodies]
            then(url)
        return statuses

    return ask


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_prompts_are_logged_only_if_asked_for(ask, tmp_path):
    for with_prompts in (False, True):
        log = tmp_path / f"{with_prompts}"
        config = ServeConfig(audit_log=str(log), audit_prompts=with_prompts)
        assert ask(config, BODY, BODY | {"prompt": [[[1]]]}) == [200, 400]
        good, bad = lines(log.read_text())
        assert good.get("prompt") == ("the cat" if with_prompts else None)
        assert ("prompt" in good, bad.get("prompt"), bad["status"]) == (with_prompts, None, "400")


def test_log_to_stderr(ask, capsys):
    assert ask(ServeConfig(audit_log="stderr"), BODY) == [200]
    (line,) = lines(capsys.readouterr().err)
    assert (line["prompt_tokens"] > 0, line["completion_tokens"]) == (True, 4)


def test_rotated_log_is_opened_again(ask, tmp_path):
    log, old = tmp_path / "audit", tmp_path / "audit.1"

    def rotate(url):
        # A line is written after its answer.
        until(lambda: lines(log.read_text()))
        log.rename(old)
        httpx.post(f"{url}/v1/completions", json=BODY)

    ask(ServeConfig(audit_log=str(log)), BODY, then=rotate)
    assert [len(lines(path.read_text())) for path in (old, log)] == [1, 1]
    assert log.stat().st_mode & 0o77 == 0


def test_requests_go_on_when_the_disk_of_the_log_is_full(ask, small_disk):
    log = small_disk / "audit"

    def fill(url):
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", 0) as file:
            while file.write(b"0" * 4096):
                pass
        assert shutil.disk_usage(small_disk).free == 0
        answers = [httpx.post(f"{url}/v1/completions", json=BODY | {"user": "x" * 9000}) for _ in range(50)]
        assert {answer.status_code for answer in answers} == {200}

    ask(ServeConfig(audit_log=str(log)), BODY, then=fill)


def test_streams_that_are_cut_off_are_charged(ask, tmp_path):
    log = tmp_path / "audit"

    def cut(url):
        body = BODY | {"stream": True, "max_tokens": 500}
        with httpx.stream("POST", f"{url}/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        until(lambda: log.exists() and lines(log.read_text()))

    ask(ServeConfig(audit_log=str(log)), then=cut)
    (line,) = lines(log.read_text())
    assert line["prompt_tokens"] > 0
    assert 0 < line["completion_tokens"] < 500


def test_limit_holds_under_concurrency(model, tmp_path):
    key, line = make_key("few")
    file = tmp_path / "keys"
    file.write_text(f"{line} 2")
    file.chmod(0o600)
    config = ServeConfig(api_keys_file=str(file))
    headers = {"authorization": f"Bearer {key}"}
    with served(model, config, open_access(config, "r1", lambda: 1)) as url, ThreadPoolExecutor(20) as pool:
        answers = pool.map(lambda _: httpx.get(f"{url}/v1/models", headers=headers), range(40))
        assert collections.Counter(answer.status_code for answer in answers) == {200: 2, 429: 38}


def test_refused_requests_are_written_down_with_their_route(ask, tmp_path):
    keys, log = tmp_path / "keys", tmp_path / "audit"
    keys.write_text(make_key("ann")[1])
    keys.chmod(0o600)

    def strangers(url):
        httpx.get(f"{url}/v1/models")
        httpx.get(f"{url}/v1/nothing")

    assert ask(ServeConfig(audit_log=str(log), api_keys_file=str(keys)), BODY, then=strangers) == [401]
    found = [(line["route"], line["status"]) for line in lines(log.read_text())]
    assert found == [("/v1/completions", "401"), ("/v1/models", "401"), ("unknown", "401")]
