"""A real model, SmolLM2-135M, upcycled: the same text, and `transformers` and training take it from there."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import load_config
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.models.hf.save import save_folder
from moe_ray.models.hf.sidecars import read_sidecars
from moe_ray.models.hf.upcycle import load_start
from moe_ray.models.transformer import build_model
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.request import Request, SamplingParams
from moe_ray.telemetry.run_log import read_metrics
from tests.conftest import RayCluster, free_port
from tests.hf_folders import load_reference
from tests.smollm2 import find_gguf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_gguf() is None, reason="`make smollm2` installs the model"),
]
PROMPT = "The capital of France is"
NEW_TOKENS = 24
CHAT_TOKENS = 48
CHATS: list[Any] = [
    [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
    [
        {"role": "system", "content": "You are a helpful assistant who answers briefly."},
        {"role": "user", "content": "Name two animals."},
        {"role": "assistant", "content": "A cat and a dog."},
        {"role": "user", "content": "  Which one barks?\n"},
    ],
    [{"role": "user", "content": "Write a short poem about the sea."}],
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    # In a process of its own, whose memory is free afterwards.
    subprocess.run([sys.executable, "-m", "tests.smollm2", str(folder)], check=True)
    return folder


def overrides(dense: Path, storage: Path) -> list[str]:
    return [f"model.upcycle_from={dense}", f"train.storage={storage}"]


# First, while this process has no model of its own.
@pytest.mark.cluster
@pytest.mark.exhaustive
def test_upcycled_model_learns_with_its_experts_on_two_workers(dense: Path, tmp_path: Path) -> None:
    command = [sys.executable, "jobs/train.py", "jobs/configs/smollm2.yaml", *overrides(dense, tmp_path)]
    # Only the last layers, for memory.
    command += ["model.num_dense_layers=24"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(tmp_path / "smollm2-moe")
    losses = [m["val_loss"] for m in metrics if "val_loss" in m]
    assert losses[-1] < losses[0] - 0.05
    assert metrics[0]["loss"] < 6
    assert metrics[-1]["ep"] == 2


@pytest.fixture(scope="module")
def upcycled(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 4 experts."""
    out = tmp_path_factory.mktemp("upcycled") / "moe"
    config = resolve_model(load_config("jobs/configs/smollm2.yaml", overrides(dense, out.parent)))
    model = build_model(config.model, seed=0)
    load_start(model, seed=0)
    tokenizer_json = (dense / "tokenizer.json").read_bytes()
    architecture = save_folder(model, out, tokenizer_json=tokenizer_json, sidecars=read_sidecars(dense))
    assert architecture.model_class == "MixtralForCausalLM"
    return out


def test_upcycled_model_says_what_the_dense_one_says(dense: Path, upcycled: Path) -> None:
    loaded = load_for_inference(upcycled)
    prompt = torch.tensor([loaded.tokenizer.encode(PROMPT)])
    expected, text = reference(dense, prompt)
    logits, upcycled_text = reference(upcycled, prompt)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=2e-4)
    assert upcycled_text == text
    assert "Paris" in loaded.tokenizer.decode(text)
    with torch.inference_mode():
        ours = loaded.model.logits(loaded.model(prompt).hidden_BSD)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-4)
    engine = Engine(loaded.model, loaded.tokenizer, max_batch_size=1, max_context=64)
    engine.submit(
        Request("one", tuple(prompt[0].tolist()), SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS))
    )
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    assert "".join(chunk.text for chunk in chunks) == loaded.tokenizer.decode(text)


@pytest.mark.cluster
def test_application_answers_chats_as_transformers_does(upcycled: Path, ray_cluster: RayCluster) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    from serve_apps.moe_lm import build

    tokenizer = AutoTokenizer.from_pretrained(upcycled)
    model = load_reference(upcycled)
    port = free_port()
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    replicas = {"serve.min_replicas": "1", "serve.max_replicas": "1", "serve.cpus_per_replica": "2"}
    try:
        serve.run(build({"checkpoint": str(upcycled), "serve.max_context": "512", **replicas}), name="chat")
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            for messages in CHATS:
                ids = tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
                )
                with torch.inference_mode():
                    found = model.generate(ids, max_new_tokens=CHAT_TOKENS, do_sample=False)[0, ids.shape[1] :]
                answer = client.chat.completions.create(
                    model="moe", messages=messages, temperature=0, max_tokens=CHAT_TOKENS, logprobs=True
                )
                assert answer.usage.prompt_tokens == ids.shape[1]
                assert answer.usage.completion_tokens == len(found)
                assert answer.choices[0].message.content == tokenizer.decode(found, skip_special_tokens=True)
                ended = found[-1] == tokenizer.eos_token_id
                assert answer.choices[0].finish_reason == ("stop" if ended else "length")
                names = [tokenizer.decode([token]) for token in found[: len(found) - int(ended)]]
                assert [entry.token for entry in answer.choices[0].logprobs.content] == names
    finally:
        serve.shutdown()


@torch.inference_mode()
def reference(folder: Path, prompt: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Logits and greedy tokens of `transformers`."""
    model = load_reference(folder)
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return model(prompt).logits, tokens[0, prompt.shape[1] :].tolist()
