"""Memory of 1 to 16 replicas of one model on a node: what its weights take in all, beside the size of the model.

Run `python benchmarks/serve_memory.py`; `--quantize int4` and `--dtype` are as in an endpoint, `--private` gives
each replica a copy of its own. The model has random weights. Replicas are processes that load it and build the
engine as the deployment does, start together, and generate some tokens.

Memory is proportional set size (PSS): a page that n processes map counts 1/n to each. Weights are the mappings of
the files that replicas share and, as no mapping says what private memory holds, what a replica's anonymous memory
grew by while it loaded.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from moe_ray.config import ModelConfig
from moe_ray.cpu import set_threads
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.engine.request import Request, SamplingParams

TARGET = 3.0
MB = 1e6


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write it as JSON."""
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="serve-memory-") as name:
        folder = Path(name)
        size = write_model(folder / "model", arguments)
        print(f"model: {size / MB:.0f} MB, quantize={arguments.quantize}\n")
        print("| replicas | weights MB | of the model | all MB | seconds to start |\n|---:|---:|---:|---:|---:|")
        for number in arguments.replicas:
            row = measure(number, folder, arguments)
            row["ratio"] = row["weights"] / size
            rows.append(row)
            shown = f"{row['weights'] / MB:.0f} | {row['ratio']:.2f} | {row['total'] / MB:.0f}"
            print(f"| {number} | {shown} | {row['seconds']:.1f} |", flush=True)
    print(f"\n{rows[-1]['ratio']:.2f} of the model's size for weights in all (target: less than {TARGET:.0f})")
    results = Path("benchmarks/results")
    results.mkdir(exist_ok=True)
    content = {"model_bytes": size, "quantize": arguments.quantize, "private": arguments.private, "rows": rows}
    (results / "serve_memory.json").write_text(json.dumps(content, indent=1))


def write_model(folder: Path, arguments: argparse.Namespace) -> int:
    """A Hugging Face folder of random weights; returns the bytes of its tensors."""
    tokenizer = train_tokenizer(Path(__file__).read_text(encoding="utf-8").splitlines(), 1000)
    config = ModelConfig(
        preset="mixtral",
        vocab_size=tokenizer.vocab_size,
        dim=512,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        num_experts=8,
        expert_dim=round(arguments.megabytes * MB / (8 * 8 * 3 * 512 * dtype_bytes(arguments))) // 64 * 64,
        max_sequence_length=512,
    )
    model = build_model(config, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(Path(scratch, "tokenizer.json"))
        content = Path(scratch, "tokenizer.json").read_bytes()
    save_folder(model, folder, tokenizer_json=content, sidecars={}, dtype=getattr(torch, arguments.dtype))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def dtype_bytes(arguments: argparse.Namespace) -> int:
    """Bytes of a weight."""
    return getattr(torch, arguments.dtype).itemsize


def measure(number: int, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Start as many replicas together, let all generate, and look at their memory while they are idle."""
    packs = "" if arguments.private else str(folder / "packs")
    command = [sys.executable, __file__, "--replica", str(folder / "model"), "--packs", packs]
    command += ["--dtype", arguments.dtype, "--quantize", arguments.quantize]
    started = time.monotonic()
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(number)
        ]
        said = [json.loads(_read(child)) for child in children]
        seconds = time.monotonic() - started
        shared = sum(pss(child.pid, packs) for child in children if packs)
        grown = sum(each["grown"] for each in said)
        total = sum(pss(child.pid) for child in children)
        # At the end of its input a replica ends.
        for child in children:
            assert child.stdin is not None
            child.stdin.close()
    return {
        "replicas": number,
        "weights": shared + grown,
        "shared": shared,
        "private": grown,
        "total": total,
        "seconds": seconds,
    }


def _read(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


def pss(process: int | str, folder: str | None = None, field: str = "Pss") -> int:
    """Bytes of a process, or of its mappings of files in a folder."""
    total, counts = 0, False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            counts = folder is None or f" {folder}/" in line
        elif counts and line.startswith(f"{field}:"):
            total += int(line.split()[1]) * 1024
    return total


def run_replica(arguments: argparse.Namespace) -> None:
    """Load, generate, say how much private memory loading took, and wait."""
    from moe_ray.serving.build_engine import build_engine
    from moe_ray.serving.load_to_serve import load_to_serve

    config = ServeConfig(
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        weights_folder=arguments.packs,
        kv_cache_bytes=8_000_000,
        max_batch_size=4,
    )
    set_threads(config.cpus_per_replica)
    before = pss("self", field="Anonymous")
    model = load_to_serve(arguments.replica, config)
    grown = pss("self", field="Anonymous") - before
    engine = build_engine(model, config, max_context=256)
    engine.submit(Request("1", tuple(range(1, 17)), SamplingParams(temperature=0.0, max_tokens=16)))
    while engine.has_work:
        engine.step()
    print(json.dumps({"grown": grown}), flush=True)
    sys.stdin.read()
    engine.close()


def parse(arguments: list[str]) -> Any:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, help="size of the model")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--quantize", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--private", action="store_true", help="share nothing")
    parser.add_argument("--replica", help=argparse.SUPPRESS)
    parser.add_argument("--packs", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    if options.replica is not None:
        run_replica(options)
    else:
        main(options)
