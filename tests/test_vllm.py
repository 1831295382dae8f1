"""vLLM behind our HTTP API: its CPU build, in an environment that `make vllm` or MOE_RAY_VLLM_PYTHON gives."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from moe_ray.checkpoint.export import export_folder
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import ModelConfig
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.errors import ConfigError
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.app import make_app
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.load_to_serve import load_to_serve
from moe_ray.serving.vllm_folder import check_vllm, folder_for_vllm
from serve_apps.moe_lm import build
from tests.conftest import free_port
from tests.test_serving import save_run
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("MOE_RAY_VLLM_PYTHON") or ROOT / ".venv-vllm" / "bin" / "python")
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="no environment with vLLM; `make vllm` makes one")
START_SECONDS = 900
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
MODEL = {
    "preset": "mixtral",
    "dim": 128,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "num_experts": 4,
    "expert_dim": 128,
    "max_sequence_length": 4096,
    "init_std": 0.3,
}
# Takes seconds.
LONG = {"max_tokens": 4000, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose logits lie far apart, and which has more rows than tokens."""
    tokenizer = train_tokenizer(["the cat sat on the mat and saw the other cat", "naïve café, 東京 🙂"] * 5, 320)
    root = tmp_path_factory.mktemp("hf")
    tokenizer.save(root / "tokenizer.json")
    config = ModelConfig.model_validate(MODEL | {"vocab_size": tokenizer.vocab_size + 8})
    model = build_model(config, seed=0)
    json_bytes = (root / "tokenizer.json").read_bytes()
    save_folder(model, root / "plain", tokenizer_json=json_bytes, sidecars={})
    # With what tells other programs how the tokenizer is used.
    export_folder(load_for_inference(root / "plain", None), root / "tiny")
    (root / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    return root / "tiny"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with heads as wide as vLLM's attention on CPUs wants them."""
    return save_run(tmp_path_factory.mktemp("storage"), dim=128)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Any:
    """Answers of our own engine to the same requests."""
    config = ServeConfig(weights_folder="", runner="torch")
    service = CompletionService(load_to_serve(folder, config), config)
    app = make_app(service)

    def post(path: str, body: dict[str, Any]) -> httpx.Response:
        async def main() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://ours") as client:
                return await client.post(path, json=body)

        return asyncio.run(main())

    yield post
    service.close()


@contextlib.contextmanager
def serving(source: Path, cache: Path, *fields: str) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    """A client of an endpoint on vLLM that is ready, and its process."""
    port = free_port()
    command = [str(PYTHON), "-m", "tests.vllm_server", str(source), str(port), *fields]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"XDG_CACHE_HOME": str(cache)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=START_SECONDS) as client:
            until(lambda: process.poll() is not None or is_ready(client), START_SECONDS)
            yield client, process
    finally:
        process.terminate()
        process.wait(120)


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def endpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = tmp_path_factory.mktemp("cache")
    with serving(folder, cache, "max_batch_size=4", "max_queued_requests=2") as (client, process):
        assert process.poll() is None, "the endpoint has ended"
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "the cat", "max_tokens": 12, "temperature": 0} | fields


def counts(client: httpx.Client) -> dict[str, float]:
    lines = [line.split() for line in client.get("/metrics").text.splitlines() if line.startswith("moe_serve_")]
    return {name.partition("{")[0].removeprefix("moe_serve_"): float(value) for name, value in lines}


SAME = {
    "greedy": {"max_tokens": 40},
    "many prompts": {"prompt": ["the cat", "naïve 東京", "saw"]},
    "token ids": {"prompt": [[5, 6, 7, 8], [9]]},
    "stop string": {"max_tokens": 60, "stop": ["e", "a", "t"]},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 100},
    "penalties": {"presence_penalty": 1.5, "frequency_penalty": 1.0, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {"7": 100}},
    "echo": {"echo": True},
    "top_k": {"temperature": 1.0, "top_k": 1, "seed": 5},
    "min_p": {"temperature": 1.0, "min_p": 1.0, "seed": -1},
}


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(START_SECONDS)
class TestEndpoint:
    @pytest.mark.parametrize("fields", SAME.values(), ids=SAME)
    def test_texts_are_those_of_our_engine(self, fields, endpoint, ours):
        theirs = endpoint.post("/v1/completions", json=body(**fields)).json()
        mine = ours("/v1/completions", body(**fields)).json()
        assert theirs["choices"] == mine["choices"]
        assert theirs["usage"]["completion_tokens"] == mine["usage"]["completion_tokens"]

    def test_streams_are_the_whole_text_in_pieces(self, endpoint):
        whole = endpoint.post("/v1/completions", json=body(max_tokens=40)).json()["choices"][0]
        client = openai.OpenAI(base_url=f"{endpoint.base_url}/v1", api_key="none")
        pieces = list(client.completions.create(**body(max_tokens=40), stream=True))
        assert len(pieces) > 3
        assert "".join(piece.choices[0].text for piece in pieces) == whole["text"]
        assert pieces[-1].choices[0].finish_reason == whole["finish_reason"]

    def test_logprobs_are_ours_but_for_the_share_of_rows_that_are_no_tokens(self, endpoint, ours):
        fields = {"logprobs": 3, "presence_penalty": 1.0, "max_tokens": 8}
        theirs = endpoint.post("/v1/completions", json=body(**fields)).json()["choices"][0]["logprobs"]
        mine = ours("/v1/completions", body(**fields)).json()["choices"][0]["logprobs"]
        assert theirs["tokens"] == mine["tokens"]
        assert theirs["text_offset"] == mine["text_offset"]
        for index, (found, expected) in enumerate(zip(theirs["top_logprobs"], mine["top_logprobs"], strict=True)):
            share = theirs["token_logprobs"][index] - mine["token_logprobs"][index]
            assert share < 1e-3
            # Rows that are no tokens may take places of the most likely.
            shifted = {text: expected[text] + share for text in found}
            assert found == pytest.approx(shifted, abs=1e-3)

    def test_a_seed_gives_the_same_text_again_and_another_one_another(self, endpoint):
        def text(seed):
            answer = endpoint.post("/v1/completions", json=body(temperature=1.5, seed=seed, max_tokens=30))
            return answer.json()["choices"][0]["text"]

        assert text(1) == text(1) != text(2)
        # vLLM takes -1 for none.
        assert text(-1) == text(-1)

    def test_chats_follow_a_schema(self, endpoint):
        schema = {
            "type": "object",
            "properties": {"animal": {"enum": ["cat", "dog"]}, "legs": {"enum": [2, 4]}},
            "required": ["animal", "legs"],
            "additionalProperties": False,
        }
        fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema}}}
        message = {"messages": [{"role": "user", "content": "the cat"}], "logprobs": True, "top_logprobs": 2}
        asked = {"model": "tiny", "max_tokens": 60, "seed": 3} | message | fields
        choice = endpoint.post("/v1/chat/completions", json=asked).json()["choices"][0]
        text = choice["message"]["content"]
        assert json.dumps(json.loads(text), ensure_ascii=False) == text
        assert set(json.loads(text)) == {"animal", "legs"}
        assert choice["finish_reason"] == "stop"
        # What the grammar forbids is none of the most likely.
        assert all(len(token["top_logprobs"]) <= 2 for token in choice["logprobs"]["content"])

    @pytest.mark.parametrize(
        ("path", "fields", "param"),
        [
            ("completions", {"temperature": 0.001}, "temperature"),
            ("completions", {"repetition_penalty": 1.1, "logit_bias": {"5": 1}}, "logit_bias"),
            ("completions", {"echo": True, "logprobs": 1}, None),
            ("completions", {"max_tokens": 5000}, "max_tokens"),
            ("completions", {"prompt": [100000]}, "prompt"),
            ("embeddings", {"input": "the cat"}, None),
            ("routing", {"input": "the cat"}, None),
        ],
    )
    def test_what_it_cannot_do_is_a_400(self, path, fields, param, endpoint):
        asked = body(**fields) if path == "completions" else {"model": "tiny"} | fields
        answer = endpoint.post(f"/v1/{path}", json=asked)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert "Fix: " in error["message"]
        assert (error["code"] == "unsupported") == ("this server runs vLLM" in error["message"])

    def test_a_deadline_ends_a_text(self, endpoint):
        before = counts(endpoint)["missed_deadlines_total"]
        answer = endpoint.post("/v1/completions", json=body(**LONG, timeout=1e-6))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert counts(endpoint)["missed_deadlines_total"] == before + 1

    def test_a_client_that_goes_away_frees_its_place(self, endpoint):
        before = counts(endpoint)["generated_tokens_total"]
        with endpoint.stream("POST", "/v1/completions", json=body(**LONG, stream=True)) as answer:
            # Held: the connection ends with its iterator.
            lines = answer.iter_lines()
            next(lines)
            assert counts(endpoint)["running"] + counts(endpoint)["waiting"] == 1
        until(lambda: counts(endpoint)["running"] + counts(endpoint)["waiting"] == 0)
        assert 0 < counts(endpoint)["generated_tokens_total"] - before < LONG["max_tokens"]

    def test_more_than_it_takes_is_a_503(self, endpoint):
        asked = body(**LONG, prompt=["the cat"] * 6, stream=True)
        with endpoint.stream("POST", "/v1/completions", json=asked) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert endpoint.post("/v1/completions", json=body()).status_code == 503
        until(lambda: counts(endpoint)["running"] + counts(endpoint)["waiting"] == 0)


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(START_SECONDS)
def test_a_checkpoint_is_served_and_stopped_with_its_texts(checkpoint: Path, tmp_path: Path) -> None:
    """It is written as a folder once; and who ends the endpoint ends vLLM's process too."""
    with serving(checkpoint, tmp_path, "max_batch_size=2", "max_context=512") as (client, process):
        loaded = load_for_inference(checkpoint)
        config = ServeConfig(runner="torch", weights_folder="", max_context=512)
        service = CompletionService(loaded, config)
        asked = body(max_tokens=20, logprobs=3)
        found = client.post("/v1/completions", json=asked).json()["choices"][0]
        local = httpx.AsyncClient(transport=httpx.ASGITransport(make_app(service)), base_url="http://ours")
        expected = asyncio.run(local.post("/v1/completions", json=asked)).json()["choices"][0]
        assert found["text"] == expected["text"]
        for position, other in zip(
            found["logprobs"]["top_logprobs"], expected["logprobs"]["top_logprobs"], strict=True
        ):
            assert position == pytest.approx(other, abs=1e-3)
        service.close()
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
    assert process.returncode == 0
    assert not psutil.wait_procs(children, timeout=30)[1]
    (made,) = [path for path in (tmp_path / "moe_ray" / "vllm").iterdir() if path.is_dir()]
    assert (made / "config.json").exists()


def test_without_vllm_it_is_refused_in_one_line(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.engine=vllm needs vLLM, which is not installed.*extra 'vllm'"):
        build({"checkpoint": str(checkpoint), "serve.engine": "vllm"})
    # In a replica too, whose environment may be another.
    with pytest.raises(ConfigError, match="which is not installed"):
        load_to_serve(checkpoint, ServeConfig(engine="vllm"))


@pytest.mark.parametrize(
    "fields",
    [
        {"quantize": "int8"},
        {"runner": "native"},
        {"follow": True},
        {"prefix_memory_bytes": 1},
        {"prefix_folder": "x"},
        {"prefix_prefetch": True},
    ],
)
def test_settings_of_our_engine_are_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=rf"serve\.{name}=.* is not possible with serve\.engine=vllm"):
        check_vllm(ServeConfig.model_validate({"engine": "vllm"} | fields), ModelConfig())


def test_models_that_vllm_does_not_read_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be expressed"):
        check_vllm(ServeConfig(engine="vllm"), ModelConfig(preset="switch"))
    export_folder(load_for_inference(folder, None, quantize="int8"), tmp_path / "int8")
    with pytest.raises(ConfigError, match="has experts in int8, which vLLM does not read"):
        folder_for_vllm(tmp_path / "int8")
    assert folder_for_vllm(folder) == folder


def test_a_checkpoint_becomes_a_folder_once(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = load_for_inference(checkpoint).path
    made = folder_for_vllm(source)
    inode = (made / "config.json").stat().st_ino
    unused = Path(shutil.copytree(made, made.with_name("unused")))
    os.utime(unused, (0, 0))
    assert folder_for_vllm(source) == made
    assert (made / "config.json").stat().st_ino == inode
    assert torch.equal(
        load_for_inference(made).model.embed.weight, load_for_inference(checkpoint).model.embed.weight
    )
    shutil.rmtree(made)
    folder_for_vllm(source)
    assert not unused.exists()
