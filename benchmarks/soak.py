"""Mixed load for half an hour: does the memory of the server grow, and does it lose a slot or a block?

Run `python benchmarks/soak.py --minutes 30`. A small model is served by a process of its own while clients stream,
leave in the middle, give up, send nonsense, embed, ask for routing and for JSON, with short and long prompts.
`--url` tests an endpoint that runs already; its memory is sampled only with `--pid`.

Every 5 s the server's resident memory, file descriptors, threads and engine are sampled. The exit status is 1 if
an answer is not as expected, if memory grows by more than MAX_GROWTH after the first five minutes (a sixth of the
time in shorter runs), or if at the end a request or block is still in use. Growth is the Theil-Sen slope, the
median of the slopes of all pairs of samples, which single jumps do not move (Theil 1950, Sen 1968).
"""

import argparse
import asyncio
import collections
import contextlib
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from local_server import running
from prometheus_client.parser import text_string_to_metric_families

from cluster.head import free_port
from moe_ray.config import ModelConfig
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model

# MiB a minute. A leak of 100 bytes a request shows at 100 requests/s.
MAX_GROWTH = 0.5
SAMPLE_SECONDS = 5.0
WARM_UP_SECONDS = 300.0
QUIET_SECONDS = 60.0
CONTEXT = 512
TEXTS = ["the cat sat on the mat and saw the other cat", '{"name": "cat", "legs": [1, 2.5e3, true]}']
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "legs": {"enum": [2, 4]}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}
# What kinds of requests there are, how often, and which statuses are right for them.
KINDS = {
    "short": (20, {200, 503}),
    "long": (8, {200, 503}),
    "chat": (12, {200, 503}),
    "stream": (20, {200, 503}),
    "left": (12, {200, 503}),
    "given up": (6, {0, 200, 503}),
    "deadline": (4, {200, 503, 504}),
    "schema": (6, {200, 400, 503}),
    "embedding": (6, {200, 503}),
    "routing": (4, {200, 503}),
    "nonsense": (10, {400, 404, 413, 415}),
}


@dataclass(frozen=True)
class Sample:
    """The server at a moment; memory, file descriptors and threads are 0 where its process is unknown."""

    seconds: float
    rss_mib: float
    fds: int
    threads: int
    running: float
    waiting: float
    blocks_used: float
    generated_tokens: float


@dataclass
class Soak:
    """What a run has seen so far."""

    url: str
    model: str
    process: psutil.Process | None
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    wrong: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def main(arguments: argparse.Namespace) -> int:
    """Run, print a line a minute and the verdict, write all as JSON; returns the exit status."""
    with contextlib.ExitStack() as stack:
        if arguments.url:
            url, process = arguments.url.rstrip("/"), psutil.Process(arguments.pid) if arguments.pid else None
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
            settings = [
                "serve.max_batch_size=16",
                "serve.cpus_per_replica=1",
                f"serve.audit_log={folder / 'audit'}",
            ]
            model = make_model(folder / "soak")
            server = stack.enter_context(running(model, free_port(20_800), folder / "log", settings))
            url, process = server.url, server.process
        headers = {"authorization": f"Bearer {arguments.key}"} if arguments.key else {}
        soak = Soak(url, "", process)
        asyncio.run(run(soak, headers, arguments.minutes * 60, arguments.clients, arguments.seed))
    return report(soak, arguments.minutes * 60)


def make_model(folder: Path) -> Path:
    """A random model in a Hugging Face folder, with a chat template."""
    tokenizer = train_tokenizer(TEXTS * 5, 300)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        dim=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        num_experts=8,
        expert_dim=64,
        max_sequence_length=CONTEXT,
        init_std=0.2,
    )
    sidecars = {"chat_template.jinja": TEMPLATE.encode()}
    model = build_model(config, seed=0)
    save_folder(model, folder, tokenizer_json=tokenizer.serialized.encode(), sidecars=sidecars)
    return folder


async def run(soak: Soak, headers: dict[str, str], seconds: float, clients: int, seed: int) -> None:
    """Put the server under load for some time, then wait until it has nothing to do."""
    limits = httpx.Limits(max_connections=clients + 2)
    async with httpx.AsyncClient(base_url=soak.url, headers=headers, timeout=120, limits=limits) as http:
        soak.model = (await http.get("/v1/models")).json()["data"][0]["id"]
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(clients):
                rng = random.Random(f"{seed} {number}")  # nosec B311
                group.create_task(_client(soak, http, rng, began + seconds))
            group.create_task(_watch(soak, http, began, began + seconds))
        for _ in range(int(QUIET_SECONDS)):
            soak.samples.append(await _sample(soak, http, began))
            last = soak.samples[-1]
            if not (last.running or last.waiting or last.blocks_used):
                return
            await asyncio.sleep(1)


async def _client(soak: Soak, http: httpx.AsyncClient, rng: random.Random, until: float) -> None:
    while time.monotonic() < until:
        (kind,) = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])
        try:
            status, said = await _ask(soak, http, rng, kind)
        except httpx.HTTPError as error:
            status, said = -1, repr(error)
        soak.counts[f"{kind} {status}"] += 1
        if status not in KINDS[kind][1]:
            soak.wrong.append(f"{kind} {status}: {said[:300]}")
        if status == 503:
            await asyncio.sleep(0.1)


async def _ask(soak: Soak, http: httpx.AsyncClient, rng: random.Random, kind: str) -> tuple[int, str]:
    """Send one request; returns status and body. Status 0: the client gave up."""
    prompt = " ".join(
        rng.choices(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "other", "cats"], k=rng.randint(1, 12))
    )
    body: dict[str, Any] = {"model": soak.model, "prompt": prompt, "max_tokens": rng.randint(1, 24)}
    path = "/v1/completions"
    if kind == "long":
        body |= {"prompt": [rng.randrange(250) for _ in range(CONTEXT - 100)], "n": rng.choice([1, 2])}
    elif kind in ("chat", "schema"):
        path = "/v1/chat/completions"
        body |= {"messages": [{"role": "user", "content": body.pop("prompt")}], "logprobs": rng.random() < 0.3}
        if kind == "schema":
            form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
            body |= {"response_format": form, "max_tokens": 60}
    elif kind in ("stream", "left"):
        return await _stream(
            http, body | {"stream": True, "max_tokens": 60}, rng.randint(0, 9) if kind == "left" else None
        )
    elif kind == "given up":
        try:
            answer = await http.post(path, json=body | {"max_tokens": 90, "n": 2}, timeout=rng.uniform(0.001, 0.2))
        except httpx.TimeoutException:
            return 0, ""
        return answer.status_code, answer.text
    elif kind == "deadline":
        body |= {"timeout": rng.uniform(0.001, 0.2), "max_tokens": 90}
    elif kind in ("embedding", "routing"):
        path = "/v1/embeddings" if kind == "embedding" else "/v1/routing"
        body = {"model": soak.model, "input": [prompt, prompt[::-1]]}
    elif kind == "nonsense":
        return await _nonsense(http, body, rng)
    answer = await http.post(path, json=body)
    return answer.status_code, answer.text


async def _stream(http: httpx.AsyncClient, body: dict[str, Any], stop_after: int | None) -> tuple[int, str]:
    async with http.stream("POST", "/v1/completions", json=body) as response:
        last, number = "", 0
        lines: AsyncIterator[str] = response.aiter_lines()
        async for line in lines:
            last, number = line or last, number + 1
            if stop_after is not None and number > stop_after:
                return response.status_code, ""
        is_whole = last == "data: [DONE]" or response.status_code != 200
        return (response.status_code, last) if is_whole else (-1, f"a stream ended with {last!r}")


async def _nonsense(http: httpx.AsyncClient, body: dict[str, Any], rng: random.Random) -> tuple[int, str]:
    text = json.dumps(body)
    content, kind = rng.choice(
        [
            (text[: len(text) // 2], "application/json"),
            (text, "text/plain"),
            (json.dumps(body | {"temperature": "hot"}), "application/json"),
            (json.dumps(body | {"model": "other"}), "application/json"),
            (json.dumps(body | {"prompt": [10**9]}), "application/json"),
            ("[" * 20_000, "application/json"),
            (" " * 4_000_001, "application/json"),
        ]
    )
    answer = await http.post("/v1/completions", content=content, headers={"content-type": kind})
    return answer.status_code, answer.text


async def _watch(soak: Soak, http: httpx.AsyncClient, began: float, until: float) -> None:
    print("| minute | requests | RSS MiB | files | threads | running | waiting | blocks | tokens |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    minute = 0
    while time.monotonic() < until:
        soak.samples.append(await _sample(soak, http, began))
        s = soak.samples[-1]
        if s.seconds >= 60 * minute:
            print(
                f"| {minute} | {soak.counts.total()} | {s.rss_mib:.1f} | {s.fds} | {s.threads} | "
                f"{s.running:.0f} | {s.waiting:.0f} | {s.blocks_used:.0f} | {s.generated_tokens:.0f} |",
                flush=True,
            )
            minute += 1
        await asyncio.sleep(SAMPLE_SECONDS)


async def _sample(soak: Soak, http: httpx.AsyncClient, began: float) -> Sample:
    """Of an endpoint of several replicas, the engine of the one that happens to answer."""
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    found = {
        sample.name.removeprefix("moe_serve_"): sample.value for family in families for sample in family.samples
    }
    process = soak.process
    return Sample(
        seconds=time.monotonic() - began,
        rss_mib=process.memory_info().rss / 2**20 if process else 0.0,
        fds=process.num_fds() if process else 0,
        threads=process.num_threads() if process else 0,
        running=found["running"],
        waiting=found["waiting"],
        blocks_used=found["blocks_used"],
        generated_tokens=found["generated_tokens_total"],
    )


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Theil-Sen: the median slope of all pairs."""
    return statistics.median((y - v) / (x - u) for (u, v), (x, y) in itertools.combinations(points, 2))


def report(soak: Soak, seconds: float) -> int:
    """Print and write what came out; returns the exit status."""
    warm_up = min(WARM_UP_SECONDS, seconds / 6)
    steady = [(s.seconds / 60, s.rss_mib) for s in soak.samples if warm_up <= s.seconds <= seconds]
    growth = slope(steady) if len(steady) > 1 else 0.0
    last = soak.samples[-1]
    held = {"running": last.running, "waiting": last.waiting, "blocks_used": last.blocks_used}
    failures = soak.wrong[:20]
    failures += [f"{name}={value:.0f} at the end" for name, value in held.items() if value]
    if growth > MAX_GROWTH:
        failures.append(f"memory grows by {growth:.2f} MiB a minute")
    print(f"\nrequests: {soak.counts.total()}; " + ", ".join(f"{k}: {n}" for k, n in sorted(soak.counts.items())))
    print(f"growth of memory after {warm_up / 60:.1f} minutes: {growth:.3f} MiB a minute (at most {MAX_GROWTH})")
    print("\n".join(failures) or "nothing leaked, no answer was wrong")
    results = Path("benchmarks/results")
    results.mkdir(exist_ok=True)
    found = {
        "minutes": seconds / 60,
        "growth_mib_per_minute": growth,
        "counts": soak.counts,
        "failures": failures,
        "samples": [asdict(sample) for sample in soak.samples],
    }
    (results / "soak.json").write_text(json.dumps(found, indent=1))
    return bool(failures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of an endpoint that runs already")
    parser.add_argument("--pid", type=int, help="its process, to sample")
    parser.add_argument("--key", help="its API key")
    sys.exit(main(parser.parse_args()))
