"""The routes over a real HTTP server in the test process: chat, choices, echo, embeddings, routing, schemas."""

import base64
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from moe_ray.checkpoint.inference import InferenceModel
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.openai.chat import ChatCompletion, ChatCompletionChunk
from moe_ray.serving.openai.completions import Completion
from moe_ray.serving.openai.embeddings import Embeddings, Routings
from moe_ray.serving.openai.errors import ErrorBody
from tests.chat_model import MAX_CONTEXT, NAME, load_chat_model, served, write_chat_folder

MAX_UNFINISHED = 12
HELLO = [{"role": "user", "content": "the cat?"}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "legs": {"enum": [2, 4]}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("hf") / NAME)


@pytest.fixture(scope="module")
def model(folder: Path) -> InferenceModel:
    return load_chat_model(folder)


@pytest.fixture(scope="module")
def url(model: InferenceModel) -> Iterator[str]:
    config = ServeConfig(max_batch_size=4, max_queued_requests=MAX_UNFINISHED - 4, max_body_bytes=200_000)
    with served(model, config) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{url}/v1", timeout=60) as http:
        yield http


def post(http: httpx.Client, route: str, answer: type, **fields: Any) -> dict[str, Any]:
    """The answer, which must be as the document says."""
    # json.dumps, unlike httpx, escapes halves of surrogate pairs.
    content = json.dumps({"model": NAME, **fields})
    response = http.post(route, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text
    TypeAdapter(answer).validate_python(response.json(), strict=True)
    return response.json()


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    return post(
        http, "/completions", Completion, **{"prompt": "the cat", "max_tokens": 8, "temperature": 0, **fields}
    )


def chat(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    return post(
        http,
        "/chat/completions",
        ChatCompletion,
        **{"messages": HELLO, "max_tokens": 8, "temperature": 0, **fields},
    )


def refused(http: httpx.Client, route: str, **fields: Any) -> tuple[int, str | None, str]:
    """Status, param and message of an error, which must be as the document says."""
    response = http.post(route, content=json.dumps(fields), headers={"content-type": "application/json"})
    error = ErrorBody.model_validate(response.json()).error
    assert "Fix: " in error.message
    assert len(error.message) < 600
    return response.status_code, error.param, error.message


def events(response: httpx.Response) -> list[dict[str, Any]]:
    *found, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def reference_logprobs(model: InferenceModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        hidden_SD = model.model(torch.tensor([tokens])).hidden_BSD[0]
        return model.model.logits(hidden_SD)[:, : model.tokenizer.vocab_size].log_softmax(-1)


def greedy(model: InferenceModel, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(reference_logprobs(model, tokens)[-1].argmax()))
    return tokens[-count:]


class TestChat:
    def test_template_gives_the_tokens_of_transformers(self, http, folder, model):
        reference = AutoTokenizer.from_pretrained(folder)
        conversations = [
            HELLO,
            [
                {"role": "system", "content": " be naïve 東京 🙂 "},
                *HELLO,
                {"role": "assistant", "content": "mat"},
                *HELLO,
            ],
            [{"role": "user", "content": ""}, {"role": "user", "content": "<b>'\"&\n\n x"}],
        ]
        for messages in conversations:
            ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            body = chat(http, messages=messages)
            assert body["usage"]["prompt_tokens"] == len(ids)
            text = model.tokenizer.decode(greedy(model, ids, 8))
            assert body["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
        with_mood = reference.apply_chat_template(
            HELLO, add_generation_prompt=True, return_dict=False, mood="glad"
        )
        body = chat(http, chat_template_kwargs={"mood": "glad"})
        assert body["usage"]["prompt_tokens"] == len(with_mood)

    def test_control_tokens_in_a_message_are_text(self, http, model):
        def count(text):
            return chat(http, messages=[{"role": "user", "content": text}])["usage"]["prompt_tokens"]

        written = "a<|im_end|><|im_start|>system"
        as_text = sum(len(model.tokenizer.encode(part)) for part in ("a", "<|im_end|>", "<|im_start|>", "system"))
        assert count(written) - count("a") == as_text - 1
        assert count("a<|endoftext|>") - count("a") == len(model.tokenizer.encode("<|endoftext|>")) > 1

    def test_parts_and_roles(self, http):
        parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "cat?"}]
        in_parts = chat(http, messages=[{"role": "user", "content": parts}])
        assert in_parts["choices"] == chat(http, messages=[{"role": "user", "content": "the\ncat?"}])["choices"]
        system = chat(http, messages=[{"role": "system", "content": "x"}, *HELLO])
        assert chat(http, messages=[{"role": "developer", "content": "x"}, *HELLO])["choices"] == system["choices"]

    def test_stream_equals_whole_answer(self, http):
        fields = {"messages": HELLO, "n": 2, "seed": 3, "temperature": 1, "max_tokens": 20}
        fields |= {"logprobs": True, "top_logprobs": 2}
        whole = chat(http, **fields)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        found = events(http.post("/chat/completions", json={"model": NAME, **fields, **options}))
        for event in found:
            ChatCompletionChunk.model_validate(event)
        assert len({event["id"] for event in found}) == 1
        for choice in whole["choices"]:
            pieces = [
                e["choices"][0] for e in found if e["choices"] and e["choices"][0]["index"] == choice["index"]
            ]
            assert pieces[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(p["delta"].get("content", "") for p in pieces) == choice["message"]["content"]
            assert [p["finish_reason"] for p in pieces if p["finish_reason"]] == [choice["finish_reason"]]
            logprobs = [lp for p in pieces if p["logprobs"] for lp in p["logprobs"]["content"]]
            assert logprobs == choice["logprobs"]["content"]
        assert found[-1]["usage"] == whole["usage"]

    def test_logprobs(self, http, model):
        content = chat(http, logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"]
        assert len(content) == 8
        for entry in content:
            assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
            assert len(entry["top_logprobs"]) == 20
            assert entry["bytes"] is None or bytes(entry["bytes"]).decode() == entry["token"]
        assert chat(http, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []

    def test_answer_may_fill_the_context(self, http):
        body = chat(http, max_tokens=None)
        assert body["usage"]["total_tokens"] == MAX_CONTEXT
        assert body["choices"][0]["finish_reason"] == "length"

    def test_each_end_of_text_token_ends_the_answer(self, http, model):
        for token in ("<|im_end|>", "<|endoftext|>"):
            bias = {str(model.tokenizer.token_id(token)): 100}
            body = chat(http, logit_bias=bias)
            assert body["choices"][0]["message"]["content"] == ""
            assert (body["choices"][0]["finish_reason"], body["usage"]["completion_tokens"]) == ("stop", 1)
            assert chat(http, logit_bias=bias, ignore_eos=True)["usage"]["completion_tokens"] == 8

    @pytest.mark.parametrize(
        ("param", "fields"),
        [
            ("messages", {"messages": []}),
            ("messages", {"messages": "hi"}),
            ("messages", {"messages": [{"role": "user"}]}),
            ("messages", {"messages": [{"role": "king", "content": "x"}]}),
            ("messages", {"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}),
            ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            ("messages", {"messages": [{"role": "user", "content": []}]}),
            ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}),
            ("messages", {"messages": [{"role": "user", "content": "ab cd " * 5000}]}),
            ("messages", {"messages": [{"role": "user", "content": "naïve " * 300}]}),
            ("messages", {"messages": [{"role": "assistant", "content": "I begin"}]}),
            ("messages", {"messages": [{"role": "user", "content": "x", "mood": 1}]}),
            ("messages", None),
            ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
            ("tool_choice", {"tool_choice": "required"}),
            ("modalities", {"modalities": ["text", "audio"]}),
            ("audio", {"audio": {"voice": "x"}}),
            ("store", {"store": True}),
            ("store", {"store": 0}),
            ("top_logprobs", {"top_logprobs": 2}),
            ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
            ("logprobs", {"logprobs": 1}),
            ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}),
            ("max_completion_tokens", {"max_completion_tokens": 0}),
            ("max_tokens", {"max_tokens": MAX_CONTEXT}),
            ("n", {"n": MAX_UNFINISHED + 1}),
            ("chat_template_kwargs", {"chat_template_kwargs": {"messages": []}}),
            ("response_format", {"response_format": {"type": "xml"}}),
            ("response_format", {"response_format": {"type": "json_schema"}}),
            ("response_format", {"response_format": "json_object"}),
            ("ignore_eos", {"response_format": {"type": "json_object"}, "ignore_eos": True}),
            ("message", {"message": HELLO}),
        ],
    )
    def test_bad_fields_are_named(self, http, param, fields):
        body = {"model": NAME, **({"messages": HELLO, **fields} if fields is not None else {})}
        assert refused(http, "/chat/completions", **body)[:2] == (400, param)

    def test_messages_of_refusals(self, http):
        def message(**fields):
            return refused(http, "/chat/completions", **{"model": NAME, "messages": HELLO, **fields})[2]

        assert "did you mean 'messages'" in message(message=[])
        assert "the user begins" in message(messages=[{"role": "assistant", "content": "I begin"}])
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
        assert '"image_url" are not supported' in message(messages=image)

    def test_model_without_a_template(self, folder, tmp_path):
        bare = tmp_path / "bare"
        bare.mkdir()
        for path in folder.iterdir():
            if path.name != "chat_template.jinja":
                (bare / path.name).symlink_to(path)
        with served(load_chat_model(bare), ServeConfig()) as url, httpx.Client(base_url=f"{url}/v1") as http:
            body = {"model": "bare", "messages": HELLO}
            assert "no chat template" in refused(http, "/chat/completions", **body)[2]


class TestSampling:
    def test_n_and_best_of(self, http):
        fields = {"temperature": 1, "seed": 7, "max_tokens": 6}
        several = complete(http, n=4, logprobs=0, **fields)["choices"]
        means = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["tokens"]) for c in several]
        order = sorted(range(4), key=lambda i: -means[i])
        assert len(set(means)) == 4
        best = complete(http, best_of=4, n=2, **fields)
        assert [choice["text"] for choice in best["choices"]] == [several[i]["text"] for i in order[:2]]
        assert [choice["logprobs"] for choice in best["choices"]] == [None, None]
        assert best["usage"]["completion_tokens"] == 24

    def test_echo(self, http, model):
        prompt = "the cat saw naïve 東京"
        ids = model.tokenizer.encode(prompt)
        plain = complete(http, prompt=prompt, logprobs=2)["choices"][0]
        choice = complete(http, prompt=prompt, echo=True, logprobs=2)["choices"][0]
        assert choice["text"] == prompt + plain["text"]
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + 8
        assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
        expected = reference_logprobs(model, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(
            torch.tensor(logprobs["token_logprobs"][1 : len(ids)]), expected, rtol=1e-4, atol=1e-4
        )
        assert logprobs["token_logprobs"][len(ids) :] == plain["logprobs"]["token_logprobs"]
        offsets = [len(prompt) + offset for offset in plain["logprobs"]["text_offset"]]
        assert logprobs["text_offset"][len(ids) :] == offsets
        for token, offset in zip(logprobs["tokens"][: len(ids)], logprobs["text_offset"], strict=False):
            assert token.startswith("token_id:") or choice["text"].startswith(token, offset)

    def test_echo_alone_scores_a_prompt(self, http, model):
        prompts = ["the cat sat", "on"]
        body = complete(http, prompt=prompts, echo=True, max_tokens=0, logprobs=1, n=2)
        assert [c["text"] for c in body["choices"]] == [prompts[0]] * 2 + [prompts[1]] * 2
        assert {c["finish_reason"] for c in body["choices"]} == {"length"}
        assert body["usage"]["completion_tokens"] == 0
        options = {"echo": True, "max_tokens": 0, "stream": True}
        (event,) = events(http.post("/completions", json={"model": NAME, "prompt": "on", **options}))
        assert event["choices"][0]["text"] == "on"

    def test_long_prompts_are_scored_in_pieces(self, http, model):
        ids = [3 + i % 250 for i in range(MAX_CONTEXT - 100)]
        values = complete(http, prompt=ids, echo=True, max_tokens=0, logprobs=0)["choices"][0]["logprobs"]
        expected = reference_logprobs(model, ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(values["token_logprobs"][1:]), expected, rtol=1e-3, atol=1e-3)

    def test_penalties_and_biases_choose_as_defined(self, http, model):
        ids = model.tokenizer.encode("the cat the cat")
        fields = {
            "presence_penalty": 0.7,
            "frequency_penalty": 1.3,
            "repetition_penalty": 1.4,
            "logit_bias": {"5": 2.5},
        }
        tokens: list[int] = []
        for _ in range(16):
            with torch.inference_mode():
                hidden_SD = model.model(torch.tensor([ids + tokens])).hidden_BSD[0]
                logits_V = model.model.logits(hidden_SD[-1])
            logits_V = logits_V.clone()
            for token in {*ids, *tokens}:
                logits_V[token] *= 1.4 if logits_V[token] < 0 else 1 / 1.4
            for token in set(tokens):
                logits_V[token] -= 0.7 + 1.3 * tokens.count(token)
            logits_V[5] += 2.5
            tokens.append(int(logits_V[: model.tokenizer.vocab_size].argmax()))
        assert len(set(tokens)) > len(set(greedy(model, ids, 16)))
        together = complete(http, prompt=[ids] * 3, max_tokens=16, **fields)["choices"]
        assert [choice["text"] for choice in together] == [model.tokenizer.decode(tokens)] * 3

    def test_bias_forbids(self, http, model):
        first = greedy(model, model.tokenizer.encode("the cat"), 1)[0]
        choice = complete(http, logit_bias={str(first): -100}, logprobs=0)["choices"][0]
        assert model.tokenizer.decode([first]) not in choice["logprobs"]["tokens"]

    def test_min_p_keeps_the_most_likely_only(self, http):
        expected = complete(http)["choices"]
        assert complete(http, temperature=1, min_p=1)["choices"] == expected
        assert complete(http, temperature=1, min_p=0, seed=1)["choices"] != expected


class TestStructured:
    def format_of(self, schema):
        return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}

    def test_text_fits_the_schema(self, http):
        for temperature, seed in ((0, 0), (1, 1), (2, 2)):
            body = chat(
                http, response_format=self.format_of(PERSON), temperature=temperature, seed=seed, max_tokens=None
            )
            found = json.loads(body["choices"][0]["message"]["content"])
            assert set(found) == {"name", "legs"}
            assert isinstance(found["name"], str)
            assert found["legs"] in (2, 4)
            assert body["choices"][0]["finish_reason"] == "stop"

    def test_rows_without_a_schema_are_as_ever(self, http):
        expected = chat(http)["choices"][0]["message"]

        def ask(i):
            if i % 2:
                return chat(http)["choices"][0]["message"] == expected
            return (
                json.loads(
                    chat(http, response_format=self.format_of({"enum": ["a b"]}))["choices"][0]["message"][
                        "content"
                    ]
                )
                == "a b"
            )

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(ask, range(8)))

    def test_json_object(self, http, model):
        closing = {str(model.tokenizer.token_id("}")): 5}
        body = chat(http, response_format={"type": "json_object"}, max_tokens=None, logit_bias=closing)
        choice = body["choices"][0]
        assert choice["message"]["content"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)

    @pytest.mark.parametrize(
        ("schema", "reason"),
        [
            ({"type": "strng"}, "strng"),
            ({"not": {"type": "string"}}, "not"),
            ({"$ref": "http://localhost/x"}, "retrieving"),
            ({"type": "string", "pattern": "("}, "regex"),
            ({"enum": ["x" * 60_000]}, "characters"),
            ({"minimum": 10**400, "type": "integer"}, ""),
            ({"x": "\ud800"}, ""),
            (json.loads('{"items":' * 150 + "{}" + "}" * 150), "recursion"),
        ],
    )
    def test_refused_schemas(self, http, schema, reason):
        body = {"model": NAME, "messages": HELLO, "max_tokens": 4, "response_format": self.format_of(schema)}
        status, param, message = refused(http, "/chat/completions", **body)
        assert (status, param) == (400, "response_format")
        assert reason in message

    def test_pathological_schemas_hold_nobody_up_for_long(self, http):
        slow = {
            "anyOf": [
                {"properties": {f"p{i}": {"enum": [f"v{j}" for j in range(20)]} for i in range(k)}}
                for k in range(12)
            ]
        }
        fields = {"messages": HELLO, "max_tokens": 4, "response_format": self.format_of(slow)}
        with ThreadPoolExecutor(8) as pool:
            answers = [
                pool.submit(http.post, "/chat/completions", json={"model": NAME, **fields}) for _ in range(8)
            ]
            assert chat(http)["usage"]["completion_tokens"] == 8
            assert {answer.result().status_code for answer in answers} <= {200, 400}


class TestEmbeddings:
    def test_mean_of_the_hidden_states(self, http, model):
        texts = ["the cat", "on", "naïve " * 60]
        body = post(http, "/embeddings", Embeddings, input=texts)
        total = 0
        for text, found in zip(texts, body["data"], strict=True):
            ids = model.tokenizer.encode(text)
            total += len(ids)
            with torch.inference_mode():
                mean_D = model.model(torch.tensor([ids])).hidden_BSD[0].mean(dim=0)
            torch.testing.assert_close(
                torch.tensor(found["embedding"]), mean_D / mean_D.norm(), rtol=1e-4, atol=1e-5
            )
        assert body["usage"] == {"prompt_tokens": total, "total_tokens": total}
        packed = post(http, "/embeddings", Embeddings, input=texts[0], encoding_format="base64")["data"][0][
            "embedding"
        ]
        values = struct.unpack("<32f", base64.b64decode(packed))
        assert values == pytest.approx(body["data"][0]["embedding"], rel=1e-6)
        ids = model.tokenizer.encode(texts[0])
        assert post(http, "/embeddings", Embeddings, input=[ids])["data"][0] == body["data"][0]

    @pytest.mark.parametrize("route", ["/embeddings", "/routing"])
    @pytest.mark.parametrize(
        ("param", "fields"),
        [
            ("input", {"input": None}),
            ("input", {"input": []}),
            ("input", {"input": 5}),
            ("input", {"input": [[]]}),
            ("input", {"input": [10**9]}),
            ("input", {"input": [10**400]}),
            ("input", {"input": [-1]}),
            ("input", {"input": "\ud800"}),
            ("input", {"input": ["a"] * 2049}),
            ("input", {"input": [5] * (MAX_CONTEXT + 1)}),
            ("dimensions", {"dimensions": 5}),
            ("inputs", {"inputs": "a"}),
            ("model", {"model": 5}),
        ],
    )
    def test_bad_fields_are_named(self, http, route, param, fields):
        assert refused(http, route, **{"model": NAME, "input": "a", **fields})[:2] == (400, param)

    def test_routing_is_that_of_the_model(self, http, model):
        text = "the cat sat"
        ids = model.tokenizer.encode(text)
        body = post(http, "/routing", Routings, input=[text, "on"])
        assert (body["num_experts"], body["top_k"]) == (4, 2)
        found = body["data"][0]
        assert found["token_ids"] == ids
        assert "".join(found["tokens"]) == text
        with torch.inference_mode():
            routings = model.model(torch.tensor([ids])).routings
        assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2]
        for layer, routing in zip(found["layers"], routings, strict=True):
            assert layer["experts"] == routing.expert_ids_TK.tolist()
            torch.testing.assert_close(torch.tensor(layer["weights"]), routing.weights_TK, rtol=1e-4, atol=1e-5)

    def test_texts_go_on_while_others_are_looked_at(self, http):
        with ThreadPoolExecutor(4) as pool:
            looks = [
                pool.submit(post, http, "/embeddings", Embeddings, input=["naïve " * 60] * 20) for _ in range(3)
            ]
            assert chat(http)["usage"]["completion_tokens"] == 8
            assert all(len(look.result()["data"]) == 20 for look in looks)


class TestClient:
    def test_chat(self, client):
        answer = client.chat.completions.create(
            model=NAME,
            messages=HELLO,
            n=2,
            seed=1,
            max_completion_tokens=9,
            logprobs=True,
            top_logprobs=3,
            stop="zzz",
        )
        assert [len(choice.logprobs.content) for choice in answer.choices] == [9, 9]
        assert answer.usage.completion_tokens == 18
        # An answer is part of the next question.
        client.chat.completions.create(
            model=NAME, messages=[*HELLO, answer.choices[0].message, *HELLO], max_tokens=1
        )

    def test_streamed_chat(self, client):
        options = {"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 20}
        whole = client.chat.completions.create(**options)
        stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        *pieces, last = list(stream)
        assert (
            "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
        )
        assert last.usage == whole.usage

    def test_parsed_output(self, client):
        from typing import Literal

        from pydantic import BaseModel

        class Pet(BaseModel):
            kind: Literal["cat", "dog"]
            legs: Literal[4]

        answer = client.chat.completions.parse(model=NAME, messages=HELLO, response_format=Pet, temperature=0)
        assert answer.choices[0].message.parsed.legs == 4

    def test_completions(self, client):
        answer = client.completions.create(
            model=NAME,
            prompt="the",
            n=2,
            best_of=3,
            echo=True,
            logit_bias={"7": 1},
            presence_penalty=0.5,
            user="me",
            extra_body={"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.1, "priority": 1, "timeout": 60},
        )
        assert all(choice.text.startswith("the") for choice in answer.choices)

    def test_embeddings(self, client):
        # The client asks for base64 unless told otherwise, and then its strict mode refuses OpenAI's own answers.
        lenient = client.with_options(_extra_kwargs={"_strict_response_validation": False})
        packed = lenient.embeddings.create(model=NAME, input=["the cat", "on"])
        plain = client.embeddings.create(model=NAME, input=["the cat", "on"], encoding_format="float")
        assert packed.data[1].embedding == pytest.approx(plain.data[1].embedding, rel=1e-6)

    def test_errors(self, client):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="other", messages=HELLO)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=NAME, messages=HELLO, max_tokens=MAX_CONTEXT)
        assert caught.value.code == "context_length_exceeded"


class TestDeadline:
    def test_a_request_whose_time_is_up_is_given_up(self, client: openai.OpenAI) -> None:
        for stream in (False, True):
            with pytest.raises(openai.APIError, match="deadline") as caught:
                list(
                    client.completions.create(
                        model=NAME, prompt="the", max_tokens=20, stream=stream, extra_body={"timeout": 1e-6}
                    )
                )
            assert caught.value.code == "deadline_exceeded"
            if not stream:
                assert isinstance(caught.value, openai.APIStatusError)
                assert caught.value.status_code == 504
        assert client.completions.create(
            model=NAME, prompt="the", max_tokens=2, extra_body={"timeout": 60}
        ).choices


class TestDocument:
    def test_references_resolve_and_errors_are_documented(self, url):
        document = httpx.get(f"{url}/openapi.json").json()
        references = json.dumps(document).split('"$ref": "')[1:]
        assert references
        for reference in references:
            node = document
            for key in reference.split('"')[0].removeprefix("#/").split("/"):
                node = node[key]
        for route in ("completions", "chat/completions", "embeddings", "routing"):
            responses = document["paths"][f"/v1/{route}"]["post"]["responses"]
            late = {"504"} if route.endswith("completions") else set()
            assert set(responses) == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503"} | late

    def test_schema_admits_what_is_accepted_and_no_more(self, url):
        jsonschema = pytest.importorskip("jsonschema")
        document = httpx.get(f"{url}/openapi.json").json()

        def accepts(name, **fields):
            schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
            return jsonschema.Draft202012Validator(schema).is_valid({"model": NAME, **fields})

        assert accepts("CompletionRequest", prompt=[[1, 2]], suffix="", stop=["a"], logit_bias={"1": 1}, seed=None)
        for bad in ({"suffix": "x"}, {"n": 0}, {"logit_bias": {"a": 1}}, {"stop": ["a"] * 5}, {"more": 1}):
            assert not accepts("CompletionRequest", prompt="a", **bad)
        parts = [{"role": "user", "content": [{"type": "text", "text": "x"}], "name": None, "tool_calls": []}]
        assert accepts("ChatRequest", messages=parts, tools=[], tool_choice="auto", store=False, audio=None)
        for bad in ({"messages": []}, {"tools": [{}]}, {"response_format": {"type": "xml"}}, {"store": True}):
            assert not accepts("ChatRequest", **{"messages": HELLO, **bad})
