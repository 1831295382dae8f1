"""Hit rates and latency of the cache by tier, on a synthetic trace of conversations.

Run `python benchmarks/cache.py`; `--checkpoint FOLDER` takes a model of yours instead of a small random one. Many
conversations share a system prompt, then take turns by Zipf's law; one that ends begins anew, as do questions that
many ask. Requests come one after another with a pause between. The KV cache (L1) holds a few conversations, the
memory tier (L2) some more, the disk (L3) all. `off` is an engine that is made to forget everything between two
requests. A request counts for the lowest tier that had a block of its prompt. In float32 all answers must
equal those of `off`.

Files are dropped from the page cache before each request unless `--warm`; where the kernel refuses nobody is told.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import ModelConfig
from moe_ray.data.tokenizer import Tokenizer as TextTokenizer
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.transformer import Transformer, build_model
from moe_ray.serving.engine.cache import bytes_per_block
from moe_ray.serving.engine.disk_tier import DiskTier
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.request import Request, SamplingParams, Tokenizer
from moe_ray.serving.engine.responses import ResponseCache
from moe_ray.serving.engine.stats import EngineStats
from moe_ray.serving.engine.thread import EngineThread
from moe_ray.serving.engine.tier_store import Tiering
from moe_ray.serving.engine.tiers import compress, decompress

SYSTEM_TOKENS, TURN_TOKENS, ANSWER_TOKENS, TURNS = 128, 48, 16, 4
CONTEXT = 512
DISK_BYTES = 1 << 32
TIERS = ("L1", "L2", "L3", "miss")


@dataclass(frozen=True)
class Measured:
    """One request: seconds to the first token, and the lowest tier that helped."""

    seconds: float
    tier: str


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and write them as JSON."""
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments)
    block = bytes_per_block(model.config, model.embed.weight.dtype)
    trace = Trace(arguments, tokenizer)
    results: dict[str, object] = {"block_bytes": block, "requests": arguments.requests}
    with tempfile.TemporaryDirectory(prefix="cache-") as name:
        folder = Path(name)
        off, answers = run_off(model, tokenizer, trace, arguments)
        for prefetch in (True, False):
            below = folder / f"prefixes-{prefetch}"
            tiering = Tiering(arguments.l2_blocks * block, below, DISK_BYTES, prefetch)
            engine = make_engine(model, tokenizer, arguments.l1_blocks, tiering)
            measured = run_trace(
                engine, trace, answers, None if arguments.warm else below, arguments.dtype == "float32"
            )
            stats = engine.stats()
            engine.close()
            title = "with prefetch" if prefetch else "without prefetch"
            results[title] = report(title, measured, off, stats)
        results["limits"] = limits(folder / "prefixes-True", model)
        results["responses"] = asyncio.run(run_responses(model, tokenizer, trace, answers, folder, arguments))
    path = Path("benchmarks/results")
    path.mkdir(exist_ok=True)
    (path / "cache.json").write_text(json.dumps(results, indent=1))


def load(arguments: argparse.Namespace) -> tuple[Transformer, TextTokenizer]:
    """The model and its tokenizer."""
    if arguments.checkpoint:
        loaded = load_for_inference(arguments.checkpoint, arguments.dtype)
        return loaded.model, loaded.tokenizer
    tokenizer = train_tokenizer(corpus().splitlines(), 2000)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        num_experts=8,
        expert_dim=512,
        max_sequence_length=CONTEXT,
        # Large, so that rounding never decides between two tokens.
        init_std=0.1,
    )
    return build_model(config, seed=0).to(getattr(torch, arguments.dtype)).eval(), tokenizer


def corpus() -> str:
    """Some text."""
    folder = Path(__file__).parent.parent / "docs"
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md")))


class Trace:
    """Prompts in the order they are asked, which grow by the answers that are given."""

    def __init__(self, arguments: argparse.Namespace, tokenizer: TextTokenizer) -> None:
        self._rng = np.random.default_rng(arguments.seed)
        self._text = tokenizer.encode(corpus())
        self._system = self._take(SYSTEM_TOKENS)
        self._says = [[self._take(TURN_TOKENS) for _ in range(TURNS)] for _ in range(arguments.conversations)]
        weights = np.arange(1, arguments.conversations + 1) ** -arguments.zipf
        order = self._rng.choice(arguments.conversations, arguments.requests, p=weights / weights.sum())
        self._order: list[int] = order.tolist()

    def prompts(self, answer: Callable[[int, list[int]], list[int]]) -> None:
        """Ask all; `answer` gets the number of each and its prompt, and gives the tokens of the answer."""
        states: dict[int, tuple[int, list[int]]] = {}
        for number, conversation in enumerate(self._order):
            turn, history = states.get(conversation, (0, self._system))
            prompt = history + self._says[conversation][turn]
            history = prompt + answer(number, prompt)
            states[conversation] = (turn + 1, history) if turn + 1 < TURNS else (0, self._system)

    def filler(self) -> list[int]:
        """A prompt that fills a cache of one context."""
        return self._rng.integers(100, size=CONTEXT - 1).tolist()

    def _take(self, count: int) -> list[int]:
        first = int(self._rng.integers(len(self._text) - count))
        return self._text[first : first + count]


def make_engine(model: Transformer, tokenizer: Tokenizer, blocks: int, tiering: Tiering | None) -> Engine:
    """An engine whose cache has this many blocks for texts."""
    size = bytes_per_block(model.config, model.embed.weight.dtype)
    return Engine(
        model,
        tokenizer,
        max_batch_size=1,
        max_context=CONTEXT,
        kv_cache_bytes=(blocks + 1) * size,
        tiering=tiering,
        identity="benchmark",
    )


def ask(
    engine: Engine, number: int, prompt: list[int], max_tokens: int = ANSWER_TOKENS
) -> tuple[float, list[int]]:
    """Seconds to the first token, and the tokens."""
    before = engine.stats().generated_tokens
    start, first = time.perf_counter(), 0.0
    engine.submit(_request(number, prompt, max_tokens))
    tokens: list[int] = []
    while engine.has_work:
        chunks = engine.step()
        if not first and engine.stats().generated_tokens > before:
            first = time.perf_counter() - start
        tokens += [logprob.token_id for chunk in chunks for logprob in chunk.logprobs]
    return first, tokens


def run_off(
    model: Transformer, tokenizer: Tokenizer, trace: Trace, arguments: argparse.Namespace
) -> tuple[list[float], list[list[int]]]:
    """Seconds and answers without a cache."""
    engine = make_engine(model, tokenizer, CONTEXT // 16, None)
    seconds: list[float] = []
    answers: list[list[int]] = []
    ask(engine, -1, trace.filler(), 1)

    def answer(number: int, prompt: list[int]) -> list[int]:
        first, tokens = ask(engine, number, prompt)
        seconds.append(first)
        answers.append(tokens)
        ask(engine, -1, trace.filler(), 1)
        return tokens

    trace.prompts(answer)
    assert engine.stats().prefix_hit_tokens == 0
    return seconds, answers


def run_trace(
    engine: Engine, trace: Trace, answers: list[list[int]], cold: Path | None, exact: bool
) -> list[Measured]:
    """All requests with a cache, in a pause between which files of the folder leave the page cache."""
    measured: list[Measured] = []

    def answer(number: int, prompt: list[int]) -> list[int]:
        before = engine.stats()
        first, tokens = ask(engine, number, prompt)
        _check(exact, number, tokens, answers)
        measured.append(Measured(first, _tier(before, engine.stats())))
        time.sleep(0.02)
        if cold:
            _drop_pages(cold)
        return answers[number]

    trace.prompts(answer)
    return measured


def report(title: str, measured: list[Measured], off: list[float], stats: EngineStats) -> dict[str, object]:
    """Print and return hit rates and latencies."""
    lower = {"L2": 16 * stats.tier_memory_hits, "L3": 16 * stats.tier_disk_hits}
    tokens = {"L1": stats.prefix_hit_tokens - sum(lower.values()), **lower}
    tokens["miss"] = stats.prefix_tokens - stats.prefix_hit_tokens
    print(f"\n{title}\n\n| tier | tokens | requests | first token p50 | p99 | off p50 | off / p50 |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    rows: dict[str, object] = {}
    for tier in TIERS:
        pairs = [(m.seconds, seconds) for m, seconds in zip(measured, off, strict=True) if m.tier == tier]
        share = tokens[tier] / stats.prefix_tokens
        cells = f"| {tier} | {share:.1%} | {len(pairs)} "
        row: dict[str, float] = {"tokens": share, "requests": len(pairs)}
        if pairs:
            times, without = [pair[0] for pair in pairs], statistics.median(pair[1] for pair in pairs)
            p50, p99 = statistics.median(times), float(np.quantile(times, 0.99))
            row |= {"p50": p50, "p99": p99, "off_p50": without}
            cells += f"| {p50 * 1e3:.1f} ms | {p99 * 1e3:.1f} ms | {without * 1e3:.1f} ms | {without / p50:.1f}x "
        print(f"{cells}|")
        rows[tier] = row
    guesses = stats.tier_prefetched
    accuracy = stats.tier_prefetch_hits / guesses if guesses else 0.0
    mean = statistics.mean(m.seconds for m in measured)
    print(f"\nmean first token {mean * 1e3:.1f} ms, off {statistics.mean(off) * 1e3:.1f} ms")
    print(f"prefetched {guesses} blocks, {accuracy:.0%} of them asked for; {stats.tier_dropped} dropped")
    print(f"held: L2 {stats.tier_memory_bytes / 1e6:.1f} MB, L3 {stats.tier_disk_bytes / 1e6:.1f} MB")
    return rows | {"prefetched": guesses, "prefetch_accuracy": accuracy, "mean": mean}


def limits(folder: Path, model: Transformer) -> dict[str, float]:
    """What copies, compression and the disk allow, on the blocks of the trace."""
    dtype = model.embed.weight.dtype
    size, item = bytes_per_block(model.config, dtype), dtype.itemsize
    _drop_pages(folder)
    tier, digests = (
        DiskTier(folder, DISK_BYTES),
        [bytes.fromhex(path.stem) for path in folder.glob("*.tier")][:500],
    )
    start = time.perf_counter()
    stored = [data for digest in digests if (data := tier.get(digest)) is not None]
    read_seconds = time.perf_counter() - start
    blocks = [decompress(data, size, item) for data in stored]
    total = size * len(blocks)
    found = {
        "ratio": total / sum(map(len, stored)),
        "disk read of files MB/s": sum(map(len, stored)) / read_seconds / 1e6,
        "compress MB/s": total / _seconds(lambda: [compress(block, item) for block in blocks]) / 1e6,
        "decompress MB/s": total / _seconds(lambda: [decompress(data, size, item) for data in stored]) / 1e6,
        "memcpy MB/s": total / _seconds(lambda: [block.copy() for block in blocks]) / 1e6,
    }
    print(
        f"\n{dtype} blocks of {size} bytes: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    )
    return found


async def run_responses(
    model: Transformer,
    tokenizer: Tokenizer,
    trace: Trace,
    answers: list[list[int]],
    folder: Path,
    arguments: argparse.Namespace,
) -> dict[str, object]:
    """Seconds of whole answers by the tier that had them; an answer takes about a kilobyte."""
    prompts: list[list[int]] = []
    exact = arguments.dtype == "float32"
    trace.prompts(lambda number, prompt: prompts.append(prompt) or answers[number])
    thread = EngineThread(make_engine(model, tokenizer, arguments.l1_blocks, None), 8)
    cache = ResponseCache(thread, 40_000, Tiering(20_000, folder / "answers", DISK_BYTES), "benchmark")
    seconds: dict[str, list[float]] = {tier: [] for tier in TIERS}
    try:
        for number, prompt in enumerate(prompts):
            before = cache.stats()
            start = time.perf_counter()
            stream = await cache.submit([_request(number, prompt, ANSWER_TOKENS)])
            tokens = [logprob.token_id async for _, chunk in stream for logprob in chunk.logprobs]
            took = time.perf_counter() - start
            _check(exact, number, tokens, answers)
            after = cache.stats()
            kinds = ("response_cache_hits", "response_memory_hits", "response_disk_hits", "response_misses")
            changed = [getattr(after, kind) > getattr(before, kind) for kind in kinds]
            seconds[TIERS[changed.index(True)]].append(took)
            if not arguments.warm:
                _drop_pages(folder / "answers")
    finally:
        thread.stop()
        cache.close()
    print("\nwhole answers\n\n| tier | requests | p50 | p99 |\n|---|---:|---:|---:|")
    for tier, times in seconds.items():
        if times:
            p50, p99 = statistics.median(times), float(np.quantile(times, 0.99))
            print(f"| {tier} | {len(times) / len(prompts):.1%} | {p50 * 1e3:.2f} ms | {p99 * 1e3:.2f} ms |")
    return {tier: sorted(times) for tier, times in seconds.items()}


def _check(exact: bool, number: int, tokens: list[int], answers: list[list[int]]) -> None:
    # In bfloat16 a prompt that is computed in other pieces may round to another token.
    assert not exact or tokens == answers[number], f"answer {number} differs from that without a cache"


def _request(number: int, prompt: list[int], max_tokens: int) -> Request:
    # Log-probabilities name the tokens.
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, logprobs=0)
    return Request(str(number), tuple(prompt), params)


def _tier(before: EngineStats, after: EngineStats) -> str:
    if after.tier_disk_hits > before.tier_disk_hits:
        return "L3"
    if after.tier_memory_hits > before.tier_memory_hits:
        return "L2"
    return "L1" if after.prefix_hit_tokens > before.prefix_hit_tokens else "miss"


def _drop_pages(folder: Path) -> None:
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    # A file that begins with a dot is still being written.
    return (path for path in folder.glob("*.tier") if not path.name.startswith("."))


def _seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="folder of a model; default: a small random one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--zipf", type=float, default=0.8, help="0: all are asked alike")
    parser.add_argument("--l1-blocks", type=int, default=64)
    parser.add_argument("--l2-blocks", type=int, default=64, help="as many blocks, not compressed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm", action="store_true", help="leave files in the page cache")
    main(parser.parse_args())
