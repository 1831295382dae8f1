"""The HTTP API: in one process for what the routes answer, on a real Ray Serve for the rest."""

import asyncio
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import torch

from moe_ray.checkpoint.attempt import Attempt
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.checkpoint.manifest import TOKENIZER
from moe_ray.checkpoint.writer import CheckpointWriter, Origin, Outcome
from moe_ray.config import Config, ModelConfig, TrainConfig
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.errors import CheckpointError, ConfigError, RequestError
from moe_ray.models.transformer import build_model
from moe_ray.parallel.mesh import build_mesh
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.app import make_app
from moe_ray.serving.autoscaling import make_autoscaling_config
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.deployment import LanguageModel
from moe_ray.serving.prompts import encode_prompt
from moe_ray.storage import open_storage
from tests.conftest import free_port

MAX_CONTEXT = 8192
MAX_BATCH, MAX_QUEUED = 3, 2
# A text this long takes seconds and ends by its length only: see `checkpoint`.
LONG = {"max_tokens": 8000, "temperature": 0}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.set_num_threads(1)
    return save_run(tmp_path_factory.mktemp("storage"))


def save_run(folder: Path, dim: int = 32) -> Path:
    """A run folder whose model never takes the end-of-text token at temperature 0."""
    tokenizer = train_tokenizer(["the cat sat on the mat and saw the other cat", "naïve 東京 🙂"] * 5, 300)
    tokenizer.save(folder / "tokenizer.json")
    config = Config(
        model=ModelConfig(
            vocab_size=tokenizer.vocab_size,
            dim=dim,
            num_layers=2,
            num_heads=2,
            num_kv_heads=1,
            num_experts=4,
            expert_dim=dim,
            max_sequence_length=MAX_CONTEXT,
            init_std=0.4,
        ),
        train=TrainConfig(storage=str(folder), name="tiny"),
        serve=ServeConfig(max_batch_size=MAX_BATCH, max_queued_requests=MAX_QUEUED, max_body_bytes=100_000),
    )
    model = build_model(config.model, seed=0)
    model.embed.weight.data[tokenizer.eos_id] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    run = open_storage(config.train.run_uri)
    files = {TOKENIZER: (folder / TOKENIZER).read_bytes()}
    attempt = Attempt(run, "attempt", lambda: True)
    attempt.claim()
    writer = CheckpointWriter(Origin(config, run, attempt, "none", files), build_mesh(1), model, optimizer)
    writer.begin(1, {})
    assert writer.finish() is Outcome.SAVED
    return folder / "tiny"


@pytest.fixture(scope="module")
def inference_model(checkpoint):
    return load_for_inference(checkpoint)


@pytest.fixture
def service(inference_model):
    service = CompletionService(inference_model, inference_model.config.serve)
    yield service
    service.close()


@pytest.fixture
def call(service):
    """Send one request to the routes, without a server between."""

    def call(method, path, **arguments):
        async def main():
            transport = httpx.ASGITransport(make_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **arguments)

        return asyncio.run(main())

    return call


@pytest.fixture
def complete(call):
    def complete(**fields):
        body = {"model": "tiny", "prompt": "the cat", "max_tokens": 5, "temperature": 0, **fields}
        # json.dumps, unlike httpx, escapes halves of surrogate pairs.
        headers = {"content-type": "application/json"}
        return call("POST", "/v1/completions", content=json.dumps(body), headers=headers)

    return complete


def error_of(response):
    """The error body, which must have OpenAI's shape and say what to do."""
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Fix: " in error["message"]
    assert "Traceback" not in error["message"]
    return error


class TestAnswers:
    def test_text_and_usage(self, complete, inference_model):
        body = complete(max_tokens=7).json()
        tokens = list(inference_model.tokenizer.encode("the cat"))
        prompt_tokens = len(tokens)
        with torch.inference_mode():
            for _ in range(7):
                hidden_SD = inference_model.model(torch.tensor([tokens])).hidden_BSD[0]
                tokens.append(int(inference_model.model.logits(hidden_SD[-1]).argmax()))
        text = inference_model.tokenizer.decode(tokens[prompt_tokens:])
        assert body["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
        assert body["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": 7,
            "total_tokens": prompt_tokens + 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        }

    def test_four_forms_of_prompt(self, complete, inference_model):
        encode = inference_model.tokenizer.encode
        one, two = (complete(prompt=text).json()["choices"][0]["text"] for text in ("the cat", "on"))
        for prompt in (["the cat", "on"], [encode("the cat"), encode("on")]):
            body = complete(prompt=prompt).json()
            assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, one), (1, two)]
            assert body["usage"]["completion_tokens"] == 10
        assert complete(prompt=encode("on")).json()["choices"][0]["text"] == two

    def test_empty_prompt_starts_a_document(self, complete, inference_model):
        from_eos = complete(prompt=[inference_model.tokenizer.eos_id]).json()
        body = complete(prompt="").json()
        assert body["choices"] == from_eos["choices"]
        assert body["usage"]["prompt_tokens"] == 1

    def test_choices_of_one_prompt_have_seeds_of_their_own(self, complete):
        body = complete(n=2, temperature=1, seed=5, max_tokens=12).json()
        texts = [choice["text"] for choice in body["choices"]]
        assert texts[0] != texts[1]
        assert body["usage"]["prompt_tokens"] == complete().json()["usage"]["prompt_tokens"]
        again = complete(n=1, temperature=1, seed=6, max_tokens=12).json()
        assert again["choices"][0]["text"] == texts[1]

    def test_logprobs(self, complete):
        choice = complete(logprobs=2).json()["choices"][0]
        logprobs = choice["logprobs"]
        assert all(len(logprobs[key]) == 5 for key in logprobs)
        assert set(logprobs) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        for token, value, top in zip(
            logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
        ):
            assert top[token] == value == max(top.values()) < 0

    def test_stream_equals_whole_answer(self, complete):
        options = {"prompt": ["the cat", "on"], "max_tokens": 20, "logprobs": 1}
        whole = complete(**options).json()
        response = complete(**options, stream=True, stream_options={"include_usage": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        events = [json.loads(event.removeprefix("data: ")) for event in events]
        assert len({event["id"] for event in events}) == 1
        for choice in whole["choices"]:
            pieces = [
                e["choices"][0] for e in events if e["choices"] and e["choices"][0]["index"] == choice["index"]
            ]
            assert "".join(piece["text"] for piece in pieces) == choice["text"]
            assert [p["finish_reason"] for p in pieces if p["finish_reason"]] == [choice["finish_reason"]]
            tokens = [token for p in pieces if p["logprobs"] for token in p["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]
        assert events[-1]["usage"] == whole["usage"]
        assert not any("usage" in event for event in events[:-1])

    def test_models(self, call):
        listed = call("GET", "/v1/models").json()
        [model] = listed["data"]
        assert (model["id"], model["step"]) == ("tiny", 1)
        assert (model["dtype"], model["quantize"], model["max_model_len"]) == ("float32", "none", MAX_CONTEXT)
        assert call("GET", "/v1/models/tiny").json() == listed["data"][0]
        response = call("GET", "/v1/models/a/b")
        assert (response.status_code, error_of(response)["code"]) == (404, "model_not_found")

    def test_health(self, call, service):
        assert call("GET", "/healthz").status_code == call("GET", "/readyz").status_code == 200
        service.close()
        assert call("GET", "/healthz").status_code == 200
        response = call("GET", "/readyz")
        assert (response.status_code, error_of(response)["type"]) == (503, "server_error")

    def test_replica_is_replaced_once_its_engine_has_stopped(self, service):
        replica = SimpleNamespace(_service=service)
        LanguageModel.check_health(replica)
        service.close()
        with pytest.raises(RuntimeError, match="engine has stopped"):
            LanguageModel.check_health(replica)

    def test_neutral_values_of_unsupported_fields(self, complete):
        neutral = {"best_of": 1, "echo": False, "logit_bias": {}, "presence_penalty": 0.0, "suffix": ""}
        assert complete(**neutral, user="me", stop=None, frequency_penalty=None).status_code == 200
        assert complete(n=2, best_of=2).status_code == 200


BAD_FIELDS = [
    ("model", {"model": "other"}, 404),
    ("model", {"model": 5}, 400),
    ("model", {"model": "\ud800"}, 404),
    ("prompt", {"prompt": None}, 400),
    ("prompt", {"prompt": 5}, 400),
    ("prompt", {"prompt": []}, 400),
    ("prompt", {"prompt": [[]]}, 400),
    ("prompt", {"prompt": ["a", [1]]}, 400),
    ("prompt", {"prompt": [1, True]}, 400),
    ("prompt", {"prompt": [1.5]}, 400),
    ("prompt", {"prompt": [-1]}, 400),
    ("prompt", {"prompt": [10**400]}, 400),
    ("prompt", {"prompt": "\ud800"}, 400),
    ("prompt", {"prompt": "ab cd " * 10_000}, 400),
    ("prompt", {"prompt": ["a"] * 6}, 400),
    ("n", {"n": 6}, 400),
    ("n", {"n": 10**30}, 400),
    ("best_of", {"best_of": 1, "n": 2}, 400),
    ("best_of", {"best_of": 3, "stream": True}, 400),
    ("suffix", {"suffix": "end"}, 400),
    ("min_p", {"min_p": 2}, 400),
    ("presence_penalty", {"presence_penalty": 3}, 400),
    ("frequency_penalty", {"frequency_penalty": "much"}, 400),
    ("repetition_penalty", {"repetition_penalty": 0}, 400),
    ("logit_bias", {"logit_bias": {"the": 1}}, 400),
    ("logit_bias", {"logit_bias": {"5": 101}}, 400),
    ("logit_bias", {"logit_bias": {"999999": 1}}, 400),
    ("priority", {"priority": 1000}, 400),
    ("timeout", {"timeout": 0}, 400),
    ("max_tokens", {"max_tokens": 0}, 400),
    ("max_tokens", {"max_tokens": 10**400}, 400),
    ("max_tokens", {"max_tokens": "5"}, 400),
    ("max_tokens", {"max_tokens": True}, 400),
    ("temperature", {"temperature": -1}, 400),
    ("temperature", {"temperature": "hot"}, 400),
    ("top_p", {"top_p": 0}, 400),
    ("top_k", {"top_k": -1}, 400),
    ("seed", {"seed": 2**70}, 400),
    ("stop", {"stop": ""}, 400),
    ("stop", {"stop": ["x"] * 10_000}, 400),
    ("stop", {"stop": [5]}, 400),
    ("logprobs", {"logprobs": 6}, 400),
    ("echo", {"echo": "yes"}, 400),
    ("prompt", {"echo": True, "max_tokens": 0, "prompt": [10**6], "logprobs": 1}, 400),
    ("stream", {"stream": "yes"}, 400),
    ("stream_options", {"stream_options": {"include_usage": True}}, 400),
    ("stream_options", {"stream": True, "stream_options": {"\ud800": 1}}, 400),
    ("temprature", {"temprature": 1}, 400),
    ("?", {"\ud800": 1}, 400),
]

BAD_BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe{}", 400),
    (b'{"model": "tiny", "prompt": "a", "temperature": NaN}', 400),
    (b'{"model": "tiny", "prompt": "a", "temperature": 1e999}', 400),
    (b'{"model": "tiny", "prompt": "a", "prompt": "b"}', 400),
    (b'{"model": "tiny", "prompt": ' + b"9" * 5000 + b"}", 400),
    (b"[" * 50_000, 400),
    (b'{"a":' * 10_000, 400),
    (b" " * 100_001, 413),
]


class TestRefusals:
    @pytest.mark.parametrize(("param", "fields", "status"), BAD_FIELDS)
    def test_bad_fields_are_named(self, complete, call, param, fields, status):
        response = complete(**fields)
        error = error_of(response)
        assert (response.status_code, error["type"]) == (status, "invalid_request_error")
        assert error["param"] == param
        assert len(error["message"]) < 500
        assert complete().status_code == 200

    @pytest.mark.parametrize(
        ("param", "value", "reason"),
        [("stop", ["x"] * 5, "at most 4 items"), ("stop", "", "at least 1 character")],
    )
    def test_value_of_several_types_is_judged_as_its_own(self, complete, param, value, reason):
        error = error_of(complete(**{param: value}))
        assert error["param"] == param
        assert reason in error["message"]

    @pytest.mark.parametrize(("content", "status"), BAD_BODIES, ids=lambda value: str(value)[:20])
    def test_bad_bodies(self, call, content, status):
        headers = {"content-type": "application/json"}
        response = call("POST", "/v1/completions", content=content, headers=headers)
        assert (response.status_code, error_of(response)["type"]) == (status, "invalid_request_error")

    @pytest.mark.parametrize(("declared", "read"), [(True, 0), (False, 101)])
    def test_large_body_is_not_read_to_the_end(self, call, declared, read):
        sent = []

        async def body():
            for _ in range(1000):
                sent.append(1)
                yield b" " * 1000

        headers = {"content-type": "application/json"} | ({"content-length": "1000000"} if declared else {})
        response = call("POST", "/v1/completions", content=body(), headers=headers)
        assert (response.status_code, error_of(response)["param"]) == (413, None)
        assert len(sent) == read

    @pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
    def test_wrong_content_type(self, call, content_type):
        headers = {"content-type": content_type} if content_type else {}
        response = call("POST", "/v1/completions", content=b"{}", headers=headers)
        assert (response.status_code, "application/json" in error_of(response)["message"]) == (415, True)

    def test_unknown_route_and_method(self, call):
        response = call("GET", "/v1/nothing")
        assert (response.status_code, error_of(response)["type"]) == (404, "invalid_request_error")
        response = call("PUT", "/v1/completions")
        assert (response.status_code, response.headers["allow"]) == (405, "POST")
        error_of(response)

    def test_unexpected_exception_tells_nothing_but_the_request_id(self, call, service, monkeypatch, caplog):
        async def fail(body):
            raise ValueError("secret detail")

        monkeypatch.setattr(service, "complete", fail)
        response = call("POST", "/v1/completions", json={}, headers={"x-request-id": "abc-1"})
        error = error_of(response)
        assert (response.status_code, error["type"]) == (500, "server_error")
        assert "abc-1" in error["message"]
        assert "secret" not in response.text
        assert "secret detail" in caplog.text
        assert "abc-1" in caplog.text

    def test_failure_within_a_stream_is_its_last_event(self, complete, inference_model):
        weight = inference_model.model.norm.weight.data
        before = weight.clone()
        weight.fill_(float("nan"))
        try:
            response = complete(stream=True)
            whole = complete()
        finally:
            weight.copy_(before)
        assert "not finite" in json.loads(response.text.removeprefix("data: "))["error"]["message"]
        assert (whole.status_code, error_of(whole)["type"]) == (500, "server_error")
        assert complete().status_code == 200

    def test_long_prompts_are_refused_before_they_are_encoded(self, inference_model):
        encoded = []

        class Counting:
            eos_id = 0

            def encode(self, text):
                encoded.append(len(text))
                return inference_model.tokenizer.encode(text)

        with pytest.raises(RequestError) as caught:
            encode_prompt(Counting(), "xyz" * 1_000_000, max_context=100)
        assert caught.value.code == "context_length_exceeded"
        assert sum(encoded) < 10_000
        text = " the" * 500
        assert encode_prompt(Counting(), text, max_context=240) == tuple(inference_model.tokenizer.encode(text))


class TestScaling:
    def test_autoscaling_follows_the_settings(self):
        config = ServeConfig(min_replicas=3, max_replicas=7, target_ongoing_requests=2.5)
        scaling = make_autoscaling_config(config)
        assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (3, 7, 2.5)
        assert scaling.policy.policy_kwargs["down_seconds"] == config.scale_down_seconds


class TestBuilder:
    def build(self, **args):
        from serve_apps.moe_lm import build

        return build({key.replace("__", "."): value for key, value in args.items()})

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({}, "'checkpoint' is missing"),
            ({"checkpiont": "x"}, "did you mean 'checkpoint'"),
            ({"checkpoint": "RUN", "serve__max_batch": "2"}, "did you mean 'serve.max_batch_size'"),
            ({"checkpoint": "RUN", "serve__max_batch_size": "many"}, "serve.max_batch_size='many'"),
            ({"checkpoint": "RUN", "serve__max_context": "9000"}, "serve.max_context=9000"),
            ({"checkpoint": "RUN", "train__steps": "5"}, "'train.steps'"),
        ],
    )
    def test_bad_arguments_are_named(self, checkpoint, args, message):
        args = {key: str(checkpoint) if value == "RUN" else value for key, value in args.items()}
        with pytest.raises(ConfigError, match=message):
            self.build(**args)

    def test_missing_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"nowhere.*does not exist"):
            self.build(checkpoint=str(tmp_path / "nowhere"))

    def test_serve_run_ends_with_the_line_alone(self):
        command = [Path(sys.executable).parent / "serve", "run", "serve_apps.moe_lm:build", "checkpoint=nowhere"]
        ended = subprocess.run(command, capture_output=True, text=True)
        assert ended.returncode == 2
        assert ended.stderr.splitlines()[-1].startswith("Error: checkpoint='nowhere'")
        assert "Traceback" not in ended.stdout + ended.stderr

    def test_relative_path_and_overrides(self, checkpoint, monkeypatch):
        monkeypatch.chdir(checkpoint.parent)
        application = self.build(checkpoint="tiny", serve__max_batch_size="8", serve__dtype="bfloat16")
        path, config, *_ = application._bound_deployment.init_args
        assert path == str(checkpoint.resolve() / "checkpoints" / "step-00000001")
        assert (config.max_batch_size, config.dtype, config.max_queued_requests) == (8, "bfloat16", MAX_QUEUED)


@pytest.fixture(scope="module")
def base_url(ray_cluster, checkpoint):
    """The real application on Ray Serve, with one replica so that its limits are reached exactly."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve_apps.moe_lm import build

    port = free_port()
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    args = {"checkpoint": str(checkpoint), "serve.min_replicas": "1", "serve.max_replicas": "1"}
    try:
        serve.run(build(args), name="moe_lm")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


@pytest.fixture
def client(base_url):
    with httpx.Client(base_url=base_url, timeout=60) as client:
        yield client


@contextlib.contextmanager
def open_stream(client, **fields):
    """A long stream that has sent its first event."""
    body = {"model": "tiny", "prompt": "the cat", "stream": True, **LONG, **fields}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        yield lines


def wait_for(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


@pytest.mark.cluster
class TestServe:
    def test_openai_client(self, base_url):
        with openai.OpenAI(
            base_url=f"{base_url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
        ) as strict:
            assert [model.id for model in strict.models.list()] == ["tiny"]
            assert strict.models.retrieve("tiny").owned_by == "moe_ray"
            options = {"model": "tiny", "prompt": "the cat", "temperature": 0, "max_tokens": 12, "logprobs": 2}
            whole = strict.completions.create(**options)
            assert whole.usage.completion_tokens == 12
            assert len(whole.choices[0].logprobs.tokens) == 12
            with pytest.raises(openai.NotFoundError) as caught:
                strict.completions.create(model="other", prompt="a")
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            assert caught.value.request_id
            with pytest.raises(openai.BadRequestError) as caught:
                strict.completions.create(model="tiny", prompt=[0] * MAX_CONTEXT)
            assert caught.value.code == "context_length_exceeded"
        # The strict mode refuses OpenAI's own streams: their finish_reason is null until the end.
        with openai.OpenAI(base_url=f"{base_url}/v1", api_key="none", max_retries=0) as lenient:
            events = list(
                lenient.completions.create(**options, stream=True, stream_options={"include_usage": True})
            )
        assert "".join(event.choices[0].text for event in events[:-1]) == whole.choices[0].text
        assert events[-2].choices[0].finish_reason == "length"
        assert events[-1].usage == whole.usage

    def test_every_answer_has_one_request_id(self, client):
        for method, path in (("GET", "/healthz"), ("GET", "/nothing"), ("POST", "/v1/completions")):
            response = client.request(method, path, headers={"x-request-id": "mine"})
            assert response.headers.get_list("x-request-id") == ["mine"]
            assert client.request(method, path).headers["x-request-id"] != "mine"

    def test_events_arrive_while_the_text_is_generated(self, client):
        with open_stream(client) as lines:
            assert next(line for line in lines if line).startswith("data: {")
            # The text is not complete: a whole one of this length would take longer than this answer.
            assert client.get("/readyz").status_code == 200

    def test_overload_is_refused_in_openai_form_and_passes(self, client):
        with contextlib.ExitStack() as stack:
            for _ in range(MAX_BATCH):
                stack.enter_context(open_stream(client))
            # One more than the queue holds: whichever comes last is refused, the others wait for a slot.
            answers = queue.Queue()
            waiting = [
                threading.Thread(target=lambda: answers.put(self.complete(client))) for _ in range(MAX_QUEUED + 1)
            ]
            for thread in waiting:
                thread.start()
            response = answers.get(timeout=30)
            assert error_of(response)["code"] == "overloaded"
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert answers.empty()
        for thread in waiting:
            thread.join(30)
        assert [answers.get().status_code for _ in range(MAX_QUEUED)] == [200] * MAX_QUEUED
        assert self.complete_until(client, 200).json()["usage"]["completion_tokens"] == 2

    def test_disconnected_clients_free_their_slots(self, client, base_url):
        for _ in range(3):
            with contextlib.ExitStack() as stack:
                for _ in range(MAX_BATCH):
                    stack.enter_context(open_stream(client))
        # Clients that wait for the whole answer give up, too.
        for _ in range(MAX_QUEUED + MAX_BATCH):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{base_url}/v1/completions", json=self.body(**LONG), timeout=0.2)
        # All slots were busy with texts that take far longer than this.
        started = time.monotonic()
        self.complete_until(client, 200)
        assert time.monotonic() - started < 3

    def test_large_body(self, client):
        response = client.post(
            "/v1/completions", content=b" " * 50_000_000, headers={"content-type": "application/json"}
        )
        assert (response.status_code, error_of(response)["type"]) == (413, "invalid_request_error")

    def body(self, **fields):
        return {"model": "tiny", "prompt": "on", "max_tokens": 2, "temperature": 0, **fields}

    def complete(self, client, **fields):
        return client.post("/v1/completions", json=self.body(**fields))

    def complete_until(self, client, status):
        answers = []
        wait_for(lambda: answers.append(self.complete(client)) or answers[-1].status_code == status)
        return answers[-1]
