"""Tokens per second of generation on a CPU: our engine, transformers, vLLM, and what the machine could do.

Run `python benchmarks/decode.py`; `--vllm PYTHON` names an interpreter in which vLLM's CPU build is installed
(benchmarks/README.md says how), `--batches 1 16 --only native-bfloat16 transformers-bfloat16` runs a part.

All generate greedily with the same random weights of a Mixtral of 111 million parameters, 33 million of them
active, after the same prompts. Every contestant is a process of its own; they take turns, round after round, so
that other load hits all alike. Decoding is the time of the whole text less that of its prompt and first token.

- native-TYPE: our engine with the C++ runner; int8 and int4 are experts over bfloat16.
- torch-TYPE: our engine without a compiler.
- transformers-TYPE, vllm-TYPE: `generate` and vLLM's offline engine.

In float32 all must give the same tokens. The limit of decoding is the time to read once the weights that a step
needs (the experts that so many tokens are expected to choose) and the keys and values, at the bandwidth of this
machine; that of a prompt is its multiplications at the rate of one large one in that type.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from decode_contestants import MODEL, make_prompts

from moe_ray.config import ModelConfig
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model

CONFIG = ModelConfig(**MODEL)
EXPERT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5 + 4 / 32}
OURS = [f"{runner}-{kind}" for runner in ("native", "torch") for kind in EXPERT_BYTES]
PEERS = [f"{name}-{kind}" for name in ("transformers", "vllm") for kind in ("float32", "bfloat16")]
DEFAULT = [name for name in (*OURS, *PEERS) if not name.startswith("torch-int")]


class Contestant:
    """A process of `decode_contestants.py`."""

    def __init__(self, name: str, folder: str, arguments: argparse.Namespace) -> None:
        role, kind = name.split("-")
        dtype = kind if kind in ("float32", "bfloat16") else "bfloat16"
        python = arguments.vllm if role == "vllm" else sys.executable
        role_name = role if role in ("vllm", "transformers") else "ours"
        options = [folder, dtype, "none" if dtype == kind else kind, role]
        program = str(Path(__file__).with_name("decode_contestants.py"))
        self.process = subprocess.Popen(
            [python, program, role_name, *options, "--threads", str(arguments.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if arguments.verbose else subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
        )
        self._read(name)

    def run(self, name: str, **job: int) -> dict[str, Any]:
        """Answer of one job."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self._read(name))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self, name: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("RESULT "):
                return line.removeprefix("RESULT ")
        sys.exit(f"{name} ended; --verbose shows what it said")


def bandwidth() -> float:
    """Bytes a second that all threads read together, the best of ten."""
    numbers = torch.ones(2**26)
    numbers.sum()
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return numbers.nbytes / min(seconds)


def gemm_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of one large multiplication, the best of ten."""
    size = 2048
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    left @ right
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        left @ right
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def bytes_of_step(kind: str, batch: int, length: float) -> float:
    """Bytes that one step must read: weights of chosen experts once, all others once, keys and values."""
    size = 4 if kind == "float32" else 2
    experts, width = CONFIG.num_experts, 3 * CONFIG.dim * CONFIG.expert_dim
    chosen = experts * (1 - (1 - CONFIG.top_k / experts) ** batch)
    kv_width = CONFIG.num_kv_heads * CONFIG.qk_dim
    attention = 2 * CONFIG.dim * (CONFIG.num_heads * CONFIG.qk_dim + kv_width)
    layer = attention * size + experts * CONFIG.dim * 4 + chosen * width * EXPERT_BYTES[kind]
    layer += batch * length * 2 * kv_width * size
    return CONFIG.num_layers * layer + CONFIG.vocab_size * CONFIG.dim * size


def measure(arguments: argparse.Namespace) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Results of all rounds, by contestant and batch."""
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "mixtral"
        save_folder(build_model(CONFIG, seed=0), folder, tokenizer_json=b"{}", sidecars={}, dtype=None)
        contestants = {name: Contestant(name, str(folder), arguments) for name in arguments.only}
        for number in range(arguments.rounds + 1):
            for batch in arguments.batches:
                job = {"new": arguments.new, **prompts_of(arguments, batch, number)}
                for name, contestant in contestants.items():
                    result = contestant.run(name, **job)
                    seconds = result["prefill"], result["total"]
                    print(
                        f"round {number} batch {batch:2} {name:22} {seconds[0]:6.2f} s for the prompts, "
                        f"{seconds[1]:6.2f} s in all",
                        flush=True,
                    )
                    # The first round warms up.
                    if number:
                        results.setdefault((name, batch), []).append(result)
        for contestant in contestants.values():
            contestant.close()
    return results


def prompts_of(arguments: argparse.Namespace, batch: int, number: int) -> dict[str, int]:
    """What the prompts of a round are made from."""
    return {"seed": 1000 * batch + number, "batch": batch, "prompt": arguments.prompt}


def check_tokens(results: dict[tuple[str, int], list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    """Say how many texts of all contestants in float32 are equal, and how close a choice others hang on."""
    for batch in arguments.batches:
        exact = [rounds for (name, b), rounds in results.items() if b == batch and name.endswith("float32")]
        texts = [[text for result in rounds for text in result["tokens"]] for rounds in exact]
        if texts:
            same = sum(all(text == other for other in others) for text, *others in zip(*texts, strict=True))
            print(
                f"batch {batch}: {same} of {len(texts[0])} texts of {len(texts)} contestants in float32 are equal"
            )
            prompts = [
                prompt
                for number in range(1, arguments.rounds + 1)
                for prompt in make_prompts(**prompts_of(arguments, batch, number))[0]
            ]
            for prompt, text, *others in zip(prompts, *texts, strict=True):
                for other in others:
                    if other != text:
                        gap = closest_choice(prompt, text, other)
                        print(f"  one differs after a choice between logits that are {gap:.1e} apart")


@torch.inference_mode()
def closest_choice(prompt: list[int], text: list[int], other: list[int]) -> float:
    """The least difference of two logits by which a token or an expert was chosen until the texts differ."""
    place = next(index for index, (one, two) in enumerate(zip(text, other, strict=True)) if one != two)
    model = build_model(CONFIG, seed=0).eval()
    output = model(torch.tensor([prompt + text[:place]]))
    logits_V = model.logits(output.hidden_BSD[0, -1])
    gaps = [abs(logits_V[text[place]] - logits_V[other[place]])]
    for routing in output.routings:
        chosen_TK = routing.logits_TE.topk(CONFIG.top_k + 1).values
        gaps.append((chosen_TK[:, -2] - chosen_TK[:, -1]).min())
    return min(gaps).item()


def report(
    results: dict[tuple[str, int], list[dict[str, Any]]], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Print the table and return its rows."""
    reads = bandwidth()
    rates = {name: gemm_rate(getattr(torch, name)) for name in ("float32", "bfloat16")}
    print(f"\nthis machine reads {reads / 1e9:.0f} GB/s and multiplies", end=" ")
    print(", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items()))
    header = ("batch", "contestant", "decode tok/s", "limit", "/vLLM", "prefill tok/s", "GEMM")
    print("{:>5} {:22}{:>13}{:>6}{:>7}{:>15}{:>6}".format(*header))
    flops = 2 * (CONFIG.num_active_params() - CONFIG.vocab_size * CONFIG.dim)
    rows = []
    for (name, batch), rounds in sorted(results.items(), key=lambda item: item[0][1]):
        kind = name.split("-")[1]
        step = statistics.median((r["total"] - r["prefill"]) / (arguments.new - 1) for r in rounds)
        prefill = statistics.median(r["prefill"] for r in rounds)
        share = bytes_of_step(kind, batch, arguments.prompt + arguments.new / 2) / reads / step
        rate = batch * arguments.prompt / prefill
        dtype = kind if kind == "float32" else "bfloat16"
        row = {
            "contestant": name,
            "batch": batch,
            "decode_tokens_per_second": batch / step,
            "share_of_bandwidth": share,
            "prefill_tokens_per_second": rate,
            "share_of_gemm": rate * flops / rates[dtype],
        }
        peer = results.get((f"vllm-{dtype}", batch))
        if peer is not None:
            theirs = statistics.median((r["total"] - r["prefill"]) / (arguments.new - 1) for r in peer)
            row["faster_than_vllm"] = theirs / step
        rows.append(row)
        ratio = f"{row['faster_than_vllm']:6.2f}x" if peer is not None else "      -"
        print(f"{batch:5} {name:22}{batch / step:13.0f}{share:6.0%}{ratio}{rate:15.0f}{row['share_of_gemm']:6.0%}")
    return rows


def main() -> None:
    """Measure, print, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--only", nargs="+", choices=(*OURS, *PEERS), default=DEFAULT)
    parser.add_argument("--vllm", help="interpreter with vLLM; without it vLLM does not take part")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--verbose", action="store_true", help="show what the contestants say")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    arguments = parser.parse_args()
    if not arguments.vllm:
        arguments.only = [name for name in arguments.only if not name.startswith("vllm")]
    results = measure(arguments)
    check_tokens(results, arguments)
    rows = report(results, arguments)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    environment = {"torch": torch.__version__, "threads": arguments.threads}
    arguments.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"\nwrote {arguments.json}")


if __name__ == "__main__":
    main()
