"""Generation by a model whose experts do not fit into memory: tokens a second, hits and memory at several budgets.

Run `python benchmarks/offload.py`; `--checkpoint FOLDER` takes a model of yours, `--quantize int4`, `--dtype` and
`--batch` are as in an endpoint. Experts are read past the page cache: every miss is a read of the disk.

Without a checkpoint the model has random weights, in the shape of gpt-oss, and routers that prefer some experts:
biases fall with the logarithm of a rank, as in Zipf's law, which the token's own choice is added to. Contestants
are processes of their own that take turns, round after round, and must give the same tokens. The first round only
warms up.

The limit is what the disk allows, the bytes that were missing a token at the rate of reading experts at random
with as many threads, or the tokens a second of the contestant that holds all experts. `mapped` is the rate at
which page faults bring in experts of the same file, which is how a mapped model larger than memory would read.
"""

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from serve_memory import pss

from moe_ray.config import ModelConfig
from moe_ray.cpu import set_threads
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.hf.save import save_folder
from moe_ray.models.top_k_router import TopKRouter
from moe_ray.models.transformer import build_model
from moe_ray.serve_config import ServeConfig

MB = 1e6
READERS = 4
NUM_LAYERS, NUM_EXPERTS, DIM, EXPERT_DIM = 8, 16, 512, 1024


def write_model(folder: Path, zipf: float) -> None:
    """A Hugging Face folder of random weights with uneven routing."""
    tokenizer = train_tokenizer(Path(__file__).read_text(encoding="utf-8").splitlines(), 1000)
    config = ModelConfig(
        preset="gpt_oss",
        vocab_size=tokenizer.vocab_size,
        dim=DIM,
        num_layers=NUM_LAYERS,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        num_experts=NUM_EXPERTS,
        top_k=2,
        expert_dim=EXPERT_DIM,
        max_sequence_length=512,
    )
    model = build_model(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for moe in model.moe_modules():
            router = cast(TopKRouter, moe.router)
            # Logits of variance 1 for normalised hidden states.
            router.weight.normal_(0, DIM**-0.5, generator=generator)
            ranks = 1 + torch.randperm(NUM_EXPERTS, generator=generator)
            cast(torch.Tensor, router.bias).copy_(-zipf * ranks.log())
    tokenizer.save(folder.parent / "tokenizer.json")
    content = (folder.parent / "tokenizer.json").read_bytes()
    save_folder(model, folder, tokenizer_json=content, sidecars={}, dtype=torch.float32)


class Contestant:
    """A process that serves the model with so many bytes for experts; None: without offloading."""

    def __init__(self, budget: int | None, prefetch: bool, folder: Path, arguments: argparse.Namespace) -> None:
        self.budget, self.prefetch = budget, prefetch
        command = [sys.executable, __file__, "--serve", str(arguments.checkpoint or folder / "model")]
        command += ["--packs", str(folder / "packs"), "--dtype", arguments.dtype, "--quantize", arguments.quantize]
        command += [
            "--batch",
            str(arguments.batch),
            "--prompt",
            str(arguments.prompt),
            "--new",
            str(arguments.new),
        ]
        command += ["--threads", str(arguments.threads)]
        command += [] if budget is None else ["--budget", str(budget)]
        command += ["--prefetch"] if prefetch else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()

    def run(self, seed: int) -> dict[str, Any]:
        """Generate, and what came of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("a contestant ended")
        return json.loads(line)


def serve(arguments: argparse.Namespace) -> None:
    """Be a contestant: load, then generate as often as asked."""
    from moe_ray.offload.experts import offloaded_experts
    from moe_ray.serving.build_engine import build_engine
    from moe_ray.serving.load_to_serve import load_to_serve

    set_threads(arguments.threads)
    before = pss("self", field="Anonymous")
    config = ServeConfig(
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        weights_folder=arguments.packs,
        max_batch_size=arguments.batch,
        expert_memory_bytes=arguments.budget,
        expert_prefetch=arguments.prefetch,
    )
    started = time.perf_counter()
    model = load_to_serve(arguments.serve, config)
    engine = build_engine(model, config, arguments.prompt + arguments.new)
    about = {"load_seconds": time.perf_counter() - started}
    offloaded = next(offloaded_experts(model.model), None)
    about["record_bytes"] = offloaded.record.num_bytes if offloaded else 0
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        result = generate(engine, model.tokenizer.vocab_size, arguments, int(line))
        print(json.dumps(result | {"anonymous": pss("self", field="Anonymous") - before}), flush=True)


def generate(engine: Any, vocab_size: int, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Tokens, seconds of decoding, and what the experts did meanwhile."""
    from moe_ray.serving.engine.request import Request, SamplingParams

    rng = np.random.default_rng(seed)
    params = SamplingParams(temperature=0.0, max_tokens=arguments.new, ignore_eos=True, logprobs=0)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(arguments.batch)}
    for name in tokens:
        prompt = tuple(rng.integers(vocab_size, size=arguments.prompt).tolist())
        engine.submit(Request(f"{seed} {name}", prompt, params))
    start, before = time.perf_counter(), None
    while engine.has_work:
        for chunk in engine.step():
            tokens[chunk.request_id.split()[1]] += [logprob.token_id for logprob in chunk.logprobs]
        if before is None and all(tokens.values()):
            prefill, before, start = time.perf_counter() - start, engine.stats(), time.perf_counter()
    seconds = time.perf_counter() - start
    after = engine.stats()
    counts = {key: value - getattr(before, key) for key, value in vars(after).items() if key.startswith("expert")}
    counts["expert_bytes_held"] = after.expert_bytes_held
    return {"tokens": list(tokens.values()), "prefill": prefill, "decode": seconds} | counts


def disk(path: Path, record_bytes: int) -> dict[str, float]:
    """Bytes a second of experts at random places, as a replica reads them and by page faults of a mapping."""
    count = path.stat().st_size // record_bytes
    places = (record_bytes * np.random.default_rng(0).permutation(count)).tolist()
    found = {}
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_DIRECT), buffering=0) as file:
        buffers = [mmap.mmap(-1, record_bytes) for _ in range(READERS)]
        for buffer in buffers:
            buffer.write(bytes(record_bytes))

        def read(number: int) -> None:
            for place in places[number::READERS]:
                os.preadv(file.fileno(), [buffers[number]], place)

        with ThreadPoolExecutor(READERS) as pool:
            start = time.perf_counter()
            list(pool.map(read, range(READERS)))
            found["read"] = len(places) * record_bytes / (time.perf_counter() - start)
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            pages = np.frombuffer(memory, dtype=np.uint8)
            start = time.perf_counter()
            for place in places:
                pages[place : place + record_bytes : mmap.PAGESIZE].sum()
            found["mapped"] = len(places) * record_bytes / (time.perf_counter() - start)
            del pages
    return found


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load all contestants, let them take turns, and put their rounds together."""
    all_experts = Contestant(2**40, False, folder, arguments)
    (path,) = (folder / "packs").glob("*.experts")
    size = path.stat().st_size
    contestants = [Contestant(None, False, folder, arguments), all_experts]
    for share in arguments.shares:
        contestants += [Contestant(round(share * size), prefetch, folder, arguments) for prefetch in (False, True)]
    rounds: list[list[dict[str, Any]]] = [[] for _ in contestants]
    disks = []
    for number in range(arguments.rounds + 1):
        for results, contestant in zip(rounds, contestants, strict=True):
            results.append(contestant.run(number))
        same = [results[-1]["tokens"] == rounds[0][-1]["tokens"] for results in rounds]
        assert all(same), f"answers differ from those without offloading: {same}"
        disks.append(disk(path, all_experts.about["record_bytes"]))
        print(f"round {number}", flush=True)
    for contestant in contestants:
        contestant.close()
    rates = {name: statistics.median(each[name] for each in disks[1:]) for name in disks[0]}
    rows = [summarise(c, r[1:], size, arguments) for c, r in zip(contestants, rounds, strict=True)]
    return {"experts_bytes": size, "disk": rates, "rows": rows, "load": all_experts.about}


def summarise(
    contestant: Contestant, rounds: list[dict[str, Any]], size: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Medians over rounds; shares of sums."""
    total = {key: sum(each[key] for each in rounds) for key in rounds[0] if key.startswith("expert")}
    tokens = arguments.batch * (arguments.new - 1)
    return {
        "budget": None if contestant.budget is None else min(contestant.budget / size, 1),
        "prefetch": contestant.prefetch,
        "tokens_per_second": tokens / statistics.median(each["decode"] for each in rounds),
        "prefill_seconds": statistics.median(each["prefill"] for each in rounds),
        "hit_rate": total["expert_hits"] / max(total["expert_hits"] + total["expert_misses"], 1),
        "prefetch_accuracy": total["expert_prefetch_hits"] / max(total["expert_prefetched"], 1),
        "prefetched": total["expert_prefetched"],
        "bytes_per_token": total["expert_bytes_read"] / tokens / len(rounds),
        "wait_share": total["expert_wait_seconds"] / sum(each["decode"] for each in rounds),
        "bytes_held": rounds[-1]["expert_bytes_held"],
        "anonymous": rounds[-1]["anonymous"],
    }


def report(found: dict[str, Any]) -> None:
    """Print the table."""
    rates, rows = found["disk"], found["rows"]
    print(
        f"\nexperts: {found['experts_bytes'] / MB:.0f} MB, made from the checkpoint in "
        f"{found['load']['load_seconds']:.0f} s"
    )
    print("disk, experts at random places: " + ", ".join(f"{k} {v / MB:.0f} MB/s" for k, v in rates.items()))
    print(
        "\n| experts in memory | prefetch | tokens/s | limit | hits | accuracy | MB/token | waiting | held MB "
        "| private MB |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    all_there = next(row for row in rows if row["budget"] == 1)["tokens_per_second"]
    for row in rows:
        row["limit"] = min(all_there, rates["read"] / max(row["bytes_per_token"], 1))
        name = "not offloaded" if row["budget"] is None else f"{row['budget']:.0%}"
        cells = (
            name,
            "yes" if row["prefetch"] else "no",
            f"{row['tokens_per_second']:.1f}",
            f"{row['limit']:.1f}",
            f"{row['hit_rate']:.0%}" if row["budget"] else "",
            f"{row['prefetch_accuracy']:.0%}" if row["prefetched"] else "",
            f"{row['bytes_per_token'] / MB:.1f}",
            f"{row['wait_share']:.0%}",
            f"{row['bytes_held'] / MB:.0f}",
            f"{row['anonymous'] / MB:.0f}",
        )
        print(f"| {' | '.join(cells)} |")


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write it as JSON."""
    with tempfile.TemporaryDirectory(prefix="offload-", dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.checkpoint is None:
            write_model(folder / "model", arguments.zipf)
        found = measure(folder, arguments)
    report(found)
    results = Path("benchmarks/results")
    results.mkdir(exist_ok=True)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("serve", "packs", "budget")}
    (results / "offload.json").write_text(json.dumps(found | {"settings": settings}, indent=1) + "\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder of a model; default: a random one")
    parser.add_argument("--folder", help="where the files are made; default: the temporary folder of the system")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--quantize", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.25], help="of the experts in memory")
    parser.add_argument("--zipf", type=float, default=1.0, help="0: all experts are chosen alike")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    for hidden, kind in (("serve", str), ("packs", str), ("budget", int)):
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--prefetch", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    if options.serve is not None:
        serve(options)
    else:
        main(options)
