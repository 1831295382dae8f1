"""Finished answers that are given again: equal to fresh ones, for the same question to the same model only."""

import asyncio
import dataclasses
import json

import httpx
import pytest

from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.app import make_app
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.engine.request import SamplingParams
from tests.chat_model import NAME, load_chat_model, write_chat_folder
from tests.damage import DAMAGES, fill, spoil
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("one_thread")
BIG = 1 << 20
CACHED = {"response_cache_bytes": BIG}
SCHEMA = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}, "required": ["legs"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "legs", "schema": SCHEMA}}


class Client:
    """Asks a service in the test process, each time from an event loop of its own."""

    def __init__(self, service):
        self._app = make_app(service)
        self.service = service

    def post(self, **fields):
        return asyncio.run(self._post(fields))

    async def _post(self, fields):
        route = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(route, json={"model": NAME, "temperature": 0, "max_tokens": 6, **fields})

    def ask(self, **fields):
        """Choices and usage of a whole answer."""
        response = self.post(**fields)
        assert response.status_code == 200, response.text
        body = response.json()
        return body["choices"], body["usage"]

    def stream(self, **fields):
        """Choices of each event, and the usage."""
        response = self.post(**fields, stream=True, stream_options={"include_usage": True})
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        *bodies, last = [json.loads(event.removeprefix("data: ")) for event in events]
        return [body["choices"] for body in bodies], last["usage"]

    def hits(self):
        """By tier: as they are, compressed in memory, on disk; and misses."""
        stats = self.service.stats()
        return (
            stats.response_cache_hits,
            stats.response_memory_hits,
            stats.response_disk_hits,
            stats.response_misses,
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_folder(tmp_path_factory.mktemp("hf") / NAME)


@pytest.fixture(scope="module")
def model(folder):
    return load_chat_model(folder)


@pytest.fixture
def serve(model):
    services = []

    def start(of=None, **settings):
        services.append(CompletionService(of or model, ServeConfig(max_batch_size=4, **settings)))
        return Client(services[-1])

    yield start
    for service in services:
        service.close()


@pytest.fixture(scope="module")
def uncached(model):
    service = CompletionService(model, ServeConfig(max_batch_size=4))
    yield Client(service)
    service.close()


REQUESTS = {
    "plain": {"prompt": "the cat"},
    "two prompts": {"prompt": ["the cat", "naïve 東"]},
    "tokens": {"prompt": [5, 6, 7]},
    "seeded": {"prompt": "on", "temperature": 1, "seed": 3, "n": 3},
    "logprobs": {"prompt": "the", "logprobs": 4, "max_tokens": 20},
    "stop": {"prompt": "the cat", "stop": ["a", "e"], "max_tokens": 30},
    "echo": {"prompt": "the cat", "echo": True, "logprobs": 1},
    "chat": {"messages": [{"role": "user", "content": "the cat?"}], "logprobs": True, "top_logprobs": 3, "n": 2},
    "schema": {"messages": [{"role": "user", "content": "?"}], "response_format": FORMAT, "max_tokens": 40},
}


def rounded(value):
    """Passes of other widths, as the cache of prefixes makes them, round otherwise."""
    return json.loads(json.dumps(value), parse_float=lambda number: round(float(number), 2))


class TestEqual:
    @pytest.mark.parametrize("name", [*REQUESTS, "best"])
    def test_to_a_fresh_answer(self, serve, uncached, name):
        fields = {**REQUESTS, "best": {"prompt": "the", "temperature": 1, "seed": 5, "best_of": 3, "n": 2}}[name]
        client = serve(**CACHED)
        choices, usage = client.ask(**fields)
        generated = client.service.stats().generated_tokens
        again, usage_again = client.ask(**fields)
        # Equal choices are kept once, though each may have rounded in its own way.
        assert rounded(again) == rounded(choices)
        assert rounded(again) == rounded(uncached.ask(**fields)[0])
        assert client.service.stats().generated_tokens == generated
        details = usage_again.pop("prompt_tokens_details")
        assert details == {"cached_tokens": usage_again["prompt_tokens"]}
        assert usage_again == {name: value for name, value in usage.items() if name != "prompt_tokens_details"}

    @pytest.mark.parametrize("name", REQUESTS)
    @pytest.mark.parametrize("first", ["ask", "stream"])
    def test_in_a_stream_too(self, serve, uncached, name, first):
        client = serve(**CACHED)
        getattr(client, first)(**REQUESTS[name])
        generated = client.service.stats().generated_tokens
        events, usage = client.stream(**REQUESTS[name])
        assert client.service.stats().generated_tokens == generated
        fresh, usage_fresh = uncached.stream(**REQUESTS[name])
        # Events of several choices come in any order.
        assert sorted(map(json.dumps, rounded(events))) == sorted(map(json.dumps, rounded(fresh)))
        assert usage["completion_tokens"] == usage_fresh["completion_tokens"]

    def test_only_what_is_missing_is_computed(self, serve, uncached):
        client = serve(**CACHED)
        client.ask(prompt="the cat")
        generated = client.service.stats().generated_tokens
        fields = {"prompt": ["on", "the cat", "mat"]}
        assert rounded(client.ask(**fields)[0]) == rounded(uncached.ask(**fields)[0])
        assert client.service.stats().generated_tokens - generated == 12
        assert client.hits() == (1, 0, 0, 3)


# Of each parameter one other value than in `BASE`.
BASE = {"messages": [{"role": "user", "content": "the cat?"}], "temperature": 1, "seed": 1}
OTHER = {
    "max_tokens": {"max_tokens": 7},
    "temperature": {"temperature": 0.9},
    "presence_penalty": {"presence_penalty": 0.1},
    "frequency_penalty": {"frequency_penalty": 0.1},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {"5": 1}},
    "grammar": {"response_format": FORMAT},
    "ignore_eos": {"ignore_eos": True},
    "stop": {"stop": "zzz"},
    "logprobs": {"logprobs": True},
    "seed": {"seed": 2},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 9},
    "min_p": {"min_p": 0.1},
}


class TestKeys:
    def test_every_parameter_makes_another_question(self, serve, uncached):
        assert set(OTHER) == {field.name for field in dataclasses.fields(SamplingParams)}
        client = serve(**CACHED)
        questions = [BASE, *({**BASE, **change} for change in OTHER.values())]
        questions.append({**BASE, "messages": [{"role": "user", "content": "the cat!"}]})
        questions.append({**BASE, "response_format": {"type": "json_object"}})
        for number, question in enumerate(questions, 1):
            assert client.ask(**question)[0] == uncached.ask(**question)[0]
            assert client.hits() == (0, 0, 0, number), question

    def test_what_does_not_matter_at_temperature_0(self, serve):
        client = serve(**CACHED)
        client.ask(prompt="the cat")
        for number, fields in enumerate(({"seed": 4}, {"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.2}), 1):
            client.ask(prompt="the cat", **fields, priority=3, timeout=60, user="somebody")
            assert client.hits() == (number, 0, 0, 1)

    def test_what_is_drawn_anew_is_not_kept(self, serve):
        client = serve(**CACHED)
        texts = {client.ask(prompt="on", temperature=1, max_tokens=30)[0][0]["text"] for _ in range(3)}
        assert len(texts) == 3
        assert client.hits() == (0, 0, 0, 0)
        assert client.service.stats().response_cache_bytes == 0

    def test_nothing_is_kept_unless_asked_for(self, serve):
        client = serve()
        for _ in range(2):
            client.ask(prompt="the cat")
        assert client.service.stats().generated_tokens == 12

    def test_models_never_answer_for_each_other(self, serve, folder, tmp_path):
        settings = {"response_folder": str(tmp_path / "cache")}
        other = tmp_path / NAME
        model = load_chat_model(folder)
        save_folder(
            build_model(model.config.model, seed=1),
            other,
            tokenizer_json=(folder / "tokenizer.json").read_bytes(),
            sidecars={"chat_template.jinja": b"{{ messages[0].content }}"},
        )
        serve(load_chat_model(folder), **settings).ask(prompt="the cat")
        for fields in ({"quantize": "int8"}, {"dtype": "bfloat16"}, {"runner": "torch"}):
            client = serve(load_chat_model(folder), **settings, **fields)
            client.ask(prompt="the cat")
            assert client.hits() == (0, 0, 0, 1), fields
        client = serve(load_chat_model(other), **settings)
        assert client.ask(prompt="the cat")[0] == serve(load_chat_model(other)).ask(prompt="the cat")[0]
        assert client.hits() == (0, 0, 0, 1)

    def test_what_is_refused_is_refused_again(self, serve, tmp_path):
        settings = {"response_folder": str(tmp_path)}
        before = serve(**settings)
        before.ask(prompt=[5] * 30)
        before.service.close()
        after = serve(**settings, max_context=32)
        assert after.post(prompt=[5] * 30).status_code == 400


class TestTiers:
    def test_hits_by_tier(self, serve, uncached, tmp_path):
        prompts = [{"prompt": [5 + i, 6], "max_tokens": 20} for i in range(8)]
        texts = [uncached.ask(**fields)[0] for fields in prompts]

        def tell(number, **settings):
            client = serve(**settings)
            for _ in range(2):
                assert [client.ask(**fields)[0] for fields in prompts] == texts
            return client, client.hits()[number]

        _, found = tell(0, response_cache_bytes=BIG)
        assert found == 8
        # Of the first tier only the last answers are left, which are not those that are asked for next.
        client, found = tell(1, response_cache_bytes=1500, response_memory_bytes=BIG)
        assert found == 8
        assert 0 < client.service.stats().response_cache_bytes <= 1500
        client, found = tell(2, response_memory_bytes=600, response_folder=str(tmp_path))
        assert found == 8
        stats = client.service.stats()
        assert 0 < stats.response_memory_bytes <= 600
        assert stats.response_disk_bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) > 600

    def test_a_budget_of_the_disk_holds(self, serve, tmp_path):
        client = serve(response_folder=str(tmp_path), response_disk_bytes=2000)
        for number in range(20):
            client.ask(prompt=[5 + number], max_tokens=20)
        client.service.close()
        assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000

    def test_replicas_share_a_folder(self, serve, uncached, tmp_path):
        clients = [serve(response_folder=str(tmp_path), response_disk_bytes=4000) for _ in range(2)]
        for number in range(30):
            fields = {"prompt": [5 + number % 7, 9], "max_tokens": 12}
            assert clients[number % 2].ask(**fields)[0] == uncached.ask(**fields)[0]
        assert all(client.hits()[2] > 0 for client in clients)
        # What one does not know of is at most what the other has written since the last look.
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2 * 4000


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_files_are_misses(self, serve, uncached, tmp_path, damage):
        prompts = [{"prompt": [5 + i, 6]} for i in range(6)]
        writer = serve(response_folder=str(tmp_path))
        for fields in prompts:
            writer.ask(**fields)
        writer.service.close()
        spoil(tmp_path, damage)
        client = serve(response_folder=str(tmp_path))
        for fields in prompts:
            assert client.ask(**fields)[0] == uncached.ask(**fields)[0]
        stats = client.service.stats()
        assert client.hits() == (0, 0, 0, 6)
        assert stats.response_damaged + stats.response_errors >= 6

    def test_files_of_others_are_left_alone(self, serve, tmp_path):
        (tmp_path / "thesis.txt").write_bytes(bytes(10_000))
        client = serve(response_folder=str(tmp_path), response_disk_bytes=1000)
        for number in range(10):
            client.ask(prompt=[5 + number])
        assert (tmp_path / "thesis.txt").stat().st_size == 10_000
        assert client.service.stats().response_disk_bytes <= 1000

    def test_a_full_disk(self, serve, uncached, small_disk):
        client = serve(response_folder=str(small_disk / "cache"))
        client.ask(prompt="before")
        until(lambda: client.service.stats().response_disk_bytes)
        filler = fill(small_disk)
        for _ in range(2):
            for prompt in ("the cat", "before"):
                assert client.ask(prompt=prompt)[0] == uncached.ask(prompt=prompt)[0]
        stats = client.service.stats()
        assert stats.response_errors > 0
        assert stats.response_disk_hits == 2
        filler.unlink()
        client.ask(prompt="the cat")
        assert client.ask(prompt="the cat")[0] == uncached.ask(prompt="the cat")[0]
        assert client.service.stats().response_disk_hits == 3

    def test_a_folder_that_cannot_be(self, serve, uncached, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        client = serve(response_folder=str(tmp_path / "file" / "cache"))
        for _ in range(2):
            assert client.ask(prompt="the cat")[0] == uncached.ask(prompt="the cat")[0]
        assert client.service.stats().response_errors > 0


class TestUnfinished:
    def test_a_text_that_broke_is_not_kept(self, serve, folder):
        model = load_chat_model(folder)
        client = serve(model, **CACHED, runner="torch")
        sound = model.model.embed.weight.data[9].clone()
        model.model.embed.weight.data[9] = float("inf")
        assert client.post(prompt=[9] * 4).status_code == 500
        model.model.embed.weight.data[9] = sound
        choices, _ = client.ask(prompt=[9] * 4)
        assert choices == client.ask(prompt=[9] * 4)[0]
        assert client.hits() == (1, 0, 0, 2)

    def test_nor_one_whose_deadline_passed(self, serve):
        client = serve(**CACHED)
        assert client.post(prompt="the cat", max_tokens=400, timeout=1e-3).status_code == 504
        client.ask(prompt="the cat", max_tokens=400)
        assert client.hits() == (0, 0, 0, 2)

    def test_nor_one_whose_client_left(self, serve):
        client = serve(**CACHED)
        body = {"model": NAME, "prompt": "the cat", "temperature": 0, "max_tokens": 400, "stream": True}

        async def leave():
            response = await client.service.complete(body)
            iterator = response.body_iterator
            await anext(iterator)
            await iterator.aclose()

        asyncio.run(leave())
        client.ask(prompt="the cat", max_tokens=400)
        assert client.hits() == (0, 0, 0, 2)
