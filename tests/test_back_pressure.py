"""Requests that would wait too long are refused at once, with the time after which there is room."""

import asyncio
import contextlib
import http.client
import time
from dataclasses import replace

import httpx
import pytest

from moe_ray.errors import RequestError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.pace import Pace
from moe_ray.serving.engine.thread import EngineThread
from tests.chat_model import NAME, load_chat_model, served, write_chat_folder
from tests.engines import MAX_CONTEXT, make_model, make_request, make_tokenizer
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, MOST = 2, 400


class TestPace:
    def pace(self):
        now = [100.0]
        return Pace(lambda: now[0]), now

    def test_a_queue_takes_its_length_over_the_rate(self):
        pace, now = self.pace()
        pace.record(waiting=40, ended=0)
        for _ in range(30):
            now[0] += 0.5
            pace.record(waiting=40, ended=5)
        assert pace.seconds(40) == pytest.approx(4, rel=0.1)
        # The rate is that of now.
        for _ in range(64):
            now[0] += 1
            pace.record(waiting=40, ended=1)
        assert pace.seconds(40) == pytest.approx(40, rel=0.1)

    def test_few_texts_say_nothing(self):
        pace, now = self.pace()
        pace.record(waiting=40, ended=7)
        now[0] += 1
        pace.record(waiting=40, ended=7)
        assert pace.seconds(40) == 0

    def test_a_queue_that_stands_still_is_long(self):
        pace, now = self.pace()
        pace.record(waiting=3, ended=0)
        now[0] += 20
        assert pace.seconds(3) == pytest.approx(60)

    def test_without_a_queue_nobody_waits(self):
        pace, now = self.pace()
        pace.record(waiting=3, ended=0)
        now[0] += 20
        pace.record(waiting=0, ended=3)
        assert pace.seconds(3) == 0


@contextlib.contextmanager
def running(**settings):
    tokenizer = make_tokenizer()
    engine = Engine(make_model(tokenizer), tokenizer, max_batch_size=BATCH, max_context=MAX_CONTEXT)
    thread = EngineThread(engine, MOST, **settings)
    try:
        yield thread
    finally:
        thread.stop()


def submit(thread, name, **fields):
    return thread.submit([replace(make_request(name, [5]), **fields)])


async def wait_for_ends(stream, count):
    """Until so many of many texts have ended."""
    async for _, chunk in stream:
        count -= chunk.finish_reason is not None
        if not count:
            return


def many():
    """Texts for many seconds."""
    return [make_request(f"r{i}", [5], max_tokens=60, ignore_eos=True) for i in range(MOST - 5)]


def test_what_cannot_begin_in_time_is_refused():
    async def main(thread):
        async with thread.submit(many()) as stream:
            await wait_for_ends(stream, 10)
            now = time.monotonic()
            with pytest.raises(RequestError, match="would wait") as caught:
                submit(thread, "soon", deadline=now + 1e-4)
            assert (caught.value.status, caught.value.code) == (503, "overloaded")
            assert caught.value.retry_after >= 1
            submit(thread, "later", deadline=now + 1000)
            # Those that wait are passed.
            submit(thread, "important", deadline=now + 1000, priority=1)

    with running() as thread:
        asyncio.run(main(thread))


def test_a_long_queue_is_refused_by_the_setting_and_passes():
    async def main(thread):
        async with thread.submit(many()) as stream:
            await wait_for_ends(stream, 10)
            with pytest.raises(RequestError, match="may for 0"):
                submit(thread, "late")
        while thread.stats().waiting:
            await asyncio.sleep(0)
        async with submit(thread, "alone") as stream:
            await wait_for_ends(stream, 1)

    with running(max_queue_seconds=1e-6) as thread:
        asyncio.run(main(thread))


def test_slow_clients_are_refused_in_openai_form(tmp_path):
    model = load_chat_model(write_chat_folder(tmp_path / NAME))
    config = ServeConfig(max_batch_size=1, max_queued_requests=1)
    body = {"model": NAME, "prompt": "the cat", "max_tokens": 4}
    with served(model, config) as url, httpx.Client(base_url=url, timeout=60) as client:
        host = url.removeprefix("http://")
        slow = [http.client.HTTPConnection(host, timeout=60) for _ in range(config.max_http_requests)]
        for connection in slow:
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "2")
            connection.endheaders()
        until(lambda: client.post("/v1/completions", json=body).status_code == 503)
        refused = client.post("/v1/completions", json=body)
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/readyz").status_code == 200
        for connection in slow:
            connection.close()
        until(lambda: client.post("/v1/completions", json=body).status_code == 200)
