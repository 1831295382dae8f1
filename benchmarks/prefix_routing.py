"""Conversations behind several replicas: cache hits and time to the first token with prefix routing and without.

Run `python benchmarks/prefix_routing.py`; `--proxy plain` takes Serve's own proxy instead of HAProxy. A Ray of its
own serves a random model three times: on N replicas with `serve.prefix_routing`, on N replicas without (HAProxy's
leastconn, or the better of two random replicas by the plain proxy), and on one replica, which sees every turn: the
limit of hits. Rounds take turns. In each, some conversations run side by side; all of a round begin with the same
instructions, and each turn goes on from the answer to the one before, after a while.

Then the cost where routing cannot gain: requests/s of short prompts, for which it asks nobody, and of one long
prompt that is in all caches.

Targets: no request fails, routed conversations hit at 95% of the limit, short requests lose at most 5%.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import aiohttp
import numpy as np
import uvloop
from http_load import Load, post, run_load
from serve_http import start_serve

from cluster.head import LOOPBACK
from cluster.local import LocalCluster, Proxy
from moe_ray.config import ModelConfig
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = "model"
CONTEXT = 4096
# Of each replica, for 65,000 tokens: all that a round needs.
CACHE_BYTES = 2**28
KINDS = ("routed", "unrouted", "one")
SYSTEM_WORDS, TURN_WORDS, ANSWER_TOKENS = 400, 150, 16
# A block, and an answer whose text is not encoded to the tokens that were generated.
SLACK_TOKENS = 64
TARGET_HITS, TARGET_RATE = 0.95, 0.95


@dataclass(frozen=True)
class Turn:
    """One answer.

    Attributes:
        number: in its conversation, from 0.
        prompt_tokens, cached_tokens: of the prompt, and of its part that was cached.
        known_tokens: of the prompt before and its answer.
        first: seconds to the first token.
    """

    number: int
    prompt_tokens: int
    cached_tokens: int
    known_tokens: int
    first: float


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and write them as JSON."""
    with tempfile.TemporaryDirectory(prefix="pr-", dir="/tmp") as name:  # nosec B108
        folder = Path(name)
        make_model(folder / MODEL)
        cluster = LocalCluster(folder / "cluster")
        try:
            os.environ.update(cluster.environment(cluster.start(2 * arguments.replicas + 2, arguments.proxy)))
            port = deploy(folder / MODEL, arguments)
            turns = converse(port, arguments)
            loads = measure_cost(port, arguments)
        finally:
            cluster.stop()
    report(turns, loads, arguments)


def make_model(folder: Path) -> None:
    """A random model whose prompts take long enough to compute."""
    tokenizer = train_tokenizer(words(), 2000)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=256,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        num_experts=8,
        expert_dim=512,
        max_sequence_length=CONTEXT,
    )
    sidecars = {"generation_config.json": json.dumps({"eos_token_id": tokenizer.eos_id}).encode()}
    model = build_model(config, seed=0)
    save_folder(model, folder, tokenizer_json=tokenizer.serialized.encode(), sidecars=sidecars, dtype=None)


def words() -> list[str]:
    """Some."""
    return " ".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))).split()


def deploy(model: Path, arguments: argparse.Namespace) -> int:
    """Serve the model three times; returns the port."""
    from ray import serve

    from serve_apps.moe_lm import build

    port = start_serve()
    settings = dict(setting.split("=", 1) for setting in arguments.settings)
    for kind in KINDS:
        count = str(1 if kind == "one" else arguments.replicas)
        size = {"serve.min_replicas": count, "serve.max_replicas": count}
        routing = {"serve.prefix_routing": str(kind == "routed").lower()}
        # The keys and values of one replica fill no cache here: what is measured is where requests go.
        application = build(
            {"checkpoint": str(model), **size, **routing, "serve.cpus_per_replica": "0.5", **settings}
        )
        serve.run(application, name=kind, route_prefix=f"/{kind}")
    return port


def converse(port: int, arguments: argparse.Namespace) -> dict[str, list[Turn]]:
    """The turns of all rounds, after one round that does not count."""
    turns: dict[str, list[Turn]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds + 1):
        for kind in KINDS:
            found = uvloop.run(run_round(f"http://{LOOPBACK}:{port}/{kind}", number, arguments))
            if number:
                turns[kind] += found
                first = statistics.median(turn.first for turn in found if turn.number) * 1e3
                print(
                    f"round {number} {kind}: hits {share_of_hits(found):.1%}, first token {first:.0f} ms",
                    flush=True,
                )
    return turns


async def run_round(url: str, number: int, arguments: argparse.Namespace) -> list[Turn]:
    """All conversations of a round, side by side."""
    text = words()
    rng = np.random.default_rng((arguments.seed, number))

    def take(count: int) -> str:
        start = int(rng.integers(len(text) - count))
        return " ".join(text[start : start + count])

    system = f"Instructions {number}. {take(SYSTEM_WORDS)}"
    says = [[take(TURN_WORDS) for _ in range(arguments.turns)] for _ in range(arguments.conversations)]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        pauses = rng.exponential(arguments.pause, (arguments.conversations, arguments.turns)).tolist()
        running = (run_conversation(session, url, system, *one) for one in zip(says, pauses, strict=True))
        found = await asyncio.gather(*running)
    return [turn for turns in found for turn in turns]


async def run_conversation(
    session: aiohttp.ClientSession, url: str, system: str, says: list[str], pauses: list[float]
) -> list[Turn]:
    """Each turn some time after the one before has been answered."""
    prompt, known = system, 0
    turns: list[Turn] = []
    for number, (said, pause) in enumerate(zip(says, pauses, strict=True)):
        await asyncio.sleep(pause)
        prompt += f"\n\n{said}"
        first, events = await stream(session, url, prompt)
        usage = events[-1]["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        turns.append(Turn(number, usage["prompt_tokens"], cached, known, first))
        known = usage["total_tokens"]
        prompt += "".join(choice["text"] for event in events for choice in event["choices"])
    return turns


async def stream(session: aiohttp.ClientSession, url: str, prompt: str) -> tuple[float, list[dict[str, Any]]]:
    """Seconds to the first event, and all events but the last."""
    options = {"stream": True, "stream_options": {"include_usage": True}}
    sizes = {"max_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0}
    began, first, events = time.perf_counter(), 0.0, []
    body = {"model": MODEL, "prompt": prompt, **sizes, **options}
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {await answer.text()}")
        async for line in answer.content:
            first = first or time.perf_counter() - began
            if line.startswith(b"data: {"):
                events.append(json.loads(line.removeprefix(b"data: ")))
    return first, events


def share_of_hits(turns: list[Turn]) -> float:
    """Of the tokens of all prompts, those that were cached."""
    return sum(turn.cached_tokens for turn in turns) / sum(turn.prompt_tokens for turn in turns)


def measure_cost(port: int, arguments: argparse.Namespace) -> dict[str, dict[str, list[Load]]]:
    """Loads of short requests, and of equal long ones, by kind; a first round does not count."""
    text = words()
    prompts = {
        "short": [" ".join(text[start : start + 10]) for start in range(0, 2560, 10)],
        "long": [" ".join(text[:600])],
    }
    loads: dict[str, dict[str, list[Load]]] = {size: {kind: [] for kind in KINDS[:2]} for size in prompts}
    for number in range(arguments.rounds + 1):
        for size, some in prompts.items():
            for kind in KINDS[:2]:
                fields = {"model": MODEL, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
                bodies = [json.dumps({**fields, "prompt": prompt}).encode() for prompt in some]
                requests = [post(f"/{kind}/v1/completions", port, body) for body in bodies]
                load = uvloop.run(run_load(port, requests, arguments.clients, arguments.seconds, 4))
                if number:
                    loads[size][kind].append(load)
                    print(f"round {number} {size} {kind}: {rate(load):.0f} requests/s", flush=True)
    return loads


def rate(load: Load) -> float:
    """Requests a second."""
    return len(load.latencies) / load.seconds


def report(
    turns: dict[str, list[Turn]], loads: dict[str, dict[str, list[Load]]], arguments: argparse.Namespace
) -> None:
    """Print and write the figures."""
    print(
        "\n| | cached tokens | turns that met their cache | first token, later turns p50 / p99 | first turns p50 |"
    )
    print("|---|---:|---:|---:|---:|")
    rows: dict[str, Any] = {}
    for kind, found in turns.items():
        later = [turn for turn in found if turn.number]
        met = sum(turn.cached_tokens > turn.known_tokens - SLACK_TOKENS for turn in later) / len(later)
        p50, p99 = np.quantile([turn.first for turn in later], (0.5, 0.99)).tolist()
        start = statistics.median(turn.first for turn in found if not turn.number)
        hits = share_of_hits(found)
        rows[kind] = {"hits": hits, "met": met, "p50": p50, "p99": p99, "first_turn_p50": start}
        print(f"| {kind} | {hits:.1%} | {met:.1%} | {p50 * 1e3:.0f} / {p99 * 1e3:.0f} ms | {start * 1e3:.0f} ms |")
    print("\n| requests/s | routed | unrouted | routed / unrouted |\n|---|---:|---:|---:|")
    failures = [
        failure
        for kinds in loads.values()
        for some in kinds.values()
        for load in some
        for failure in load.failures
    ]
    for size, kinds in loads.items():
        rates = {kind: [rate(load) for load in some] for kind, some in kinds.items()}
        ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
        routed, unrouted = (statistics.median(some) for some in rates.values())
        rows[size] = {"routed": routed, "unrouted": unrouted, "ratio": ratio, "rates": rates}
        print(f"| {size} | {routed:.0f} | {unrouted:.0f} | {ratio:.2f} |")
    share = rows["routed"]["hits"] / rows["one"]["hits"]
    print(f"\nrouted conversations hit at {share:.1%} of the limit (target: {TARGET_HITS:.0%}), ", end="")
    print(
        f"short requests run at {rows['short']['ratio']:.1%} (target: {TARGET_RATE:.0%}); {len(failures)} failed"
    )
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    settings = vars(arguments) | {"cpus": os.cpu_count()}
    (results / "prefix_routing.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    if failures:
        raise SystemExit(f"requests failed: {failures[:3]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="of all applications, such as serve.dtype=bfloat16")
    parser.add_argument("--proxy", choices=get_args(Proxy), help="default: HAProxy where there is one")
    parser.add_argument("--replicas", type=int, default=3)
    parser.add_argument("--conversations", type=int, default=8, help="side by side")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds before a turn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=50, help="of the measurements of requests/s")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each of them")
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
