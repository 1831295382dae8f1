"""Three replicas on real Ray Serve: conversations meet their caches, and what is lost costs no answer."""

import asyncio
import itertools
import json
import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from moe_ray.serving.affinity.directory import DirectoryClient
from moe_ray.serving.affinity.router import PrefixRouter, Report
from moe_ray.serving.api_keys import make_key
from tests.chat_model import NAME, write_chat_folder
from tests.conftest import free_port
from tests.waiting import until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
REPLICAS = 3
CONTEXT = 3072
# 6,000 bytes, some 1,400 tokens of this model and 23 chunks of its router: more than any load here outweighs.
SYSTEM = "the cat sat on the mat and saw the other cat. " * 130
MORE = " the other cat saw the cat and sat on the mat." * 2


class Endpoint:
    """A running application, asked with one of its keys."""

    def __init__(self, url, keys, dashboard):
        self.url, self.keys, self.dashboard = url, keys, dashboard
        self._client = httpx.Client(base_url=url, timeout=60)

    def post(self, prompt, key="free", **fields):
        body = {"model": NAME, "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
        headers = {"authorization": f"Bearer {self.keys.get(key, key)}", "x-request-id": "mine"}
        return self._client.post("/v1/completions", json=body, headers=headers)

    def ask(self, prompt, **fields):
        """The cached tokens of an answer."""
        answer = self.post(prompt, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get_list("x-request-id") == ["mine"]
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    def metrics(self):
        """The numbers of each replica, by name; a new one takes the place of one that is gone."""
        found = {}
        headers = {"authorization": f"Bearer {self.keys['free']}"}

        def all_are_scraped():
            text = self._client.get("/metrics", headers=headers).text
            numbers = re.findall(r'^moe_serve_(\w+?)(?:_total)?\{replica="(.+?)"\} (.+)$', text, re.MULTILINE)
            found[numbers[0][1]] = {name: float(value) for name, _, value in numbers}
            return len(found) == REPLICAS

        until(all_are_scraped, seconds=90)
        return found

    def total(self, name):
        return sum(numbers[name] for numbers in self.metrics().values())


@pytest.fixture(scope="module")
def endpoint(ray_cluster, tmp_path_factory):
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve_apps.moe_lm import build

    folder, port = tmp_path_factory.mktemp("prefix"), free_port()
    made = {name: make_key(name) for name in ("free", "limited")}
    keys = folder / "keys"
    keys.write_text(f"{made['free'][1]}\n{made['limited'][1]} 1000\n")
    keys.chmod(0o600)
    settings = {
        "min_replicas": REPLICAS,
        "max_replicas": REPLICAS,
        "max_batch_size": 8,
        "runner": "torch",
        "prefix_routing": True,
        "prefix_routing_bytes": 500,
        "api_keys_file": keys,
    }
    args = {f"serve.{name}": str(value) for name, value in settings.items()}
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    try:
        model = write_chat_folder(folder / NAME, CONTEXT)
        serve.run(build({"checkpoint": str(model), **args}), name="prefix")
        url, texts = f"http://127.0.0.1:{port}", {name: key for name, (key, _) in made.items()}
        endpoint = Endpoint(url, texts, ray_cluster.dashboard)
        wait_until_joined(endpoint, "joined")
        yield endpoint
    finally:
        serve.shutdown()


def wait_until_joined(endpoint, text):
    """Until a conversation meets its cache wherever its turns come, so that all replicas know the directory."""
    prompt = f"{text} {SYSTEM}"
    hits = []

    def all_hit():
        hits.append(endpoint.ask(prompt) > 0)
        return hits[-12:] == [True] * 12

    until(all_hit, 120)


def pids(endpoint, kind):
    from ray.util.state import list_actors

    actors = [actor for actor in list_actors(address=endpoint.dashboard) if actor.state == "ALIVE"]
    return {actor.name.rpartition("#")[2]: actor.pid for actor in actors if kind in actor.class_name}


def converse(endpoint, name, turns=4):
    """Cached tokens by turn, and the last prompt."""
    prompt = f"{name} {SYSTEM}"
    cached = []
    for _ in range(turns):
        cached.append(endpoint.ask(prompt))
        prompt += MORE
    return cached, prompt


def test_all_turns_but_the_first_hit(endpoint):
    before = endpoint.total("affinity_handed")
    for number in range(6):
        cached, _ = converse(endpoint, f"conversation {number}")
        assert cached[0] == 0
        assert cached[1] > 1000
        assert cached == sorted(set(cached)), "each turn knows more than the one before"
    assert endpoint.total("affinity_handed") > before


def test_short_requests_are_not_looked_up(endpoint):
    before = [endpoint.total(name) for name in ("affinity_kept", "affinity_handed")]
    for _ in range(10):
        endpoint.ask("the cat")
    assert [endpoint.total(name) for name in ("affinity_kept", "affinity_handed")] == before


def test_streams(endpoint):
    prompt = f"stream {SYSTEM}"
    options = {"stream": True, "stream_options": {"include_usage": True}}
    texts, hits = set(), 0
    for _ in range(9):
        answer = endpoint.post(prompt, **options)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert events[-1] == "[DONE]"
        chunks = [json.loads(event) for event in events[:-1]]
        texts.add("".join(choice["text"] for chunk in chunks for choice in chunk["choices"]))
        hits += chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert (len(texts), hits) == (1, 8)


def test_a_client_that_leaves_frees_the_replica_that_answers(endpoint):
    headers = {"authorization": f"Bearer {endpoint.keys['free']}"}
    body = {"model": NAME, "prompt": f"leave {SYSTEM}", "max_tokens": 400, "ignore_eos": True}
    for _ in range(6):
        with httpx.stream(
            "POST", f"{endpoint.url}/v1/completions", json={**body, "stream": True}, headers=headers
        ) as s:
            assert s.status_code == 200
            next(s.iter_raw())
    until(lambda: endpoint.total("running") == 0)


def test_what_nobody_waits_for_is_no_work(ray_cluster, monkeypatch):
    import ray
    from ray import serve

    router = ray.remote(PrefixRouter).options(num_cpus=0).remote()
    monkeypatch.setattr(serve, "get_deployment_actor", lambda name: router)
    links = itertools.count()

    def prompt():
        return [next(links) for _ in range(30)]

    async def main():
        await router.report.remote(Report("other", "other:1", 0.0, 10_000))
        client = DirectoryClient("here", lambda: Report("here", "here:1", 0.0, 10_000))
        try:
            while (choice := await client.choose(prompt())) is None:
                await asyncio.sleep(0.01)
            client.finish(choice)
            for _ in range(5):
                asking = asyncio.create_task(client.choose(prompt()))
                await asyncio.sleep(0)
                asking.cancel()
            for _ in range(300):
                choice = await client.choose(prompt())
                client.finish(choice)
            assert choice.replica == "here"
        finally:
            await client.close()

    asyncio.run(main())
    ray.kill(router)


def test_errors_come_back_whole(endpoint):
    for _ in range(4):
        answer = endpoint.post(f"errors {SYSTEM}", temperature=9)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")


def test_keys(endpoint):
    refused = endpoint.post(f"keys {SYSTEM}", key="wrong")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    before = endpoint.total("affinity_kept") + endpoint.total("affinity_handed")
    for _ in range(4):
        endpoint.ask(f"keys {SYSTEM}", key="limited")
    assert endpoint.total("affinity_kept") + endpoint.total("affinity_handed") == before


def test_a_hot_prefix_spreads(endpoint):
    before = endpoint.metrics()
    with ThreadPoolExecutor(24) as pool:
        prompts = [f"hot {SYSTEM} {number}" for number in range(72)]
        assert len(list(pool.map(endpoint.ask, prompts))) == 72
    after = endpoint.metrics()
    assert all(after[name]["generated_tokens"] > before[name]["generated_tokens"] for name in after)


def test_the_directory_dies(endpoint):
    _, prompt = converse(endpoint, "directory")
    (pid,) = pids(endpoint, "PrefixRouter").values()
    os.kill(pid, signal.SIGKILL)
    for number in range(12):
        endpoint.ask(f"{number} {prompt}")
    until(lambda: endpoint.total("affinity_unasked") > 0 or endpoint.ask(prompt) < 0)
    wait_until_joined(endpoint, "a new directory")
    until(lambda: pids(endpoint, "PrefixRouter"), 120)


def test_a_replica_dies(endpoint):
    """Its conversations go on elsewhere: what others handed to it they answer themselves."""
    prompts = [converse(endpoint, f"before the kill {number}", turns=2)[1] for number in range(9)]
    before = endpoint.metrics()
    prompts = [prompt for prompt in prompts if endpoint.ask(prompt) > 0]
    after = endpoint.metrics()
    grown = {name: after[name]["prefix_hit_tokens"] - before[name]["prefix_hit_tokens"] for name in after}
    home = max(grown, key=grown.__getitem__)
    os.kill(pids(endpoint, "LanguageModel")[home], signal.SIGKILL)
    for prompt in prompts:
        endpoint.ask(prompt + MORE)
    assert all(endpoint.ask(prompt + MORE) > 1000 for prompt in prompts)
    assert sum(numbers["affinity_unreached"] for name, numbers in endpoint.metrics().items()) > 0
    wait_until_joined(endpoint, "with a new replica")
