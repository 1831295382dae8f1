"""Requests a second of the quickstart's model behind Ray Serve, beside an empty Serve application.

Run `python benchmarks/serve_http.py`; `--proxy plain` takes Serve's own proxy instead of HAProxy. A Ray of its own
serves the architecture of the quickstart with random weights, and an application that answers a constant; both
have two replicas and the same options. Clients keep their connections and send the next request when they have an
answer. Rounds take turns: ours, empty, ours streamed. All run on this machine, the load generator included.

Targets: every request succeeds, 929.7 requests/s on two cores, 40% of the empty application.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import uvloop
from http_load import Load, post, run_load

from cluster.head import LOOPBACK, free_port
from cluster.local import LocalCluster, Proxy
from moe_ray.config import load_config
from moe_ray.data.tokenizer import Tokenizer, train_tokenizer
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "jobs" / "configs" / "quickstart.yaml"
TARGET_RATE, TARGET_SHARE = 929.7, 0.4
PROMPTS = 256
REPLICAS = 2
KINDS = ("ours", "empty", "streamed")


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write it as JSON."""
    with tempfile.TemporaryDirectory(prefix="http-", dir="/tmp") as name:  # nosec B108
        folder = Path(name)
        tokenizer = make_model(folder / "quickstart")
        cluster = LocalCluster(folder / "cluster")
        try:
            os.environ.update(cluster.environment(cluster.start(2 * REPLICAS + 2, arguments.proxy)))
            port = deploy(folder / "quickstart", arguments)
            if arguments.hold:
                input(f"http://{LOOPBACK}:{port}; Enter goes on ")
            loads = measure(port, tokenizer, arguments)
        finally:
            cluster.stop()
    found = {kind: summarize(loads[kind]) for kind in KINDS}
    report(found, arguments)


def make_model(folder: Path, *settings: str) -> Tokenizer:
    """Save the quickstart's model, untrained and perhaps with other settings, as a Hugging Face folder."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    config = resolve_model(load_config(str(CONFIG), list(settings))).model
    tokenizer = train_tokenizer(text.splitlines(), config.vocab_size)
    sidecars = {"generation_config.json": json.dumps({"eos_token_id": tokenizer.eos_id}).encode()}
    model = build_model(config, seed=0)
    save_folder(model, folder, tokenizer_json=tokenizer.serialized.encode(), sidecars=sidecars, dtype=None)
    return tokenizer


def start_serve() -> int:
    """Connect to the cluster and start Serve; returns the port."""
    import ray
    from ray import serve

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    port = free_port(28_000)
    options: Any = {"host": LOOPBACK, "port": port}
    serve.start(http_options=options)
    return port


def deploy(model: Path, arguments: argparse.Namespace) -> int:
    """Serve both applications; returns the port."""
    from ray import serve

    from serve_apps.moe_lm import build

    port = start_serve()
    settings = dict(setting.split("=", 1) for setting in arguments.settings)
    size = {"serve.min_replicas": str(REPLICAS), "serve.max_replicas": str(REPLICAS)}
    serve.run(build({"checkpoint": str(model), **size, **settings}), name="ours", route_prefix="/")
    serve.run(empty_application(), name="empty", route_prefix="/empty")
    return port


def empty_application() -> Any:
    """A Serve application that answers a constant."""
    from ray import serve

    class Empty:
        async def __call__(self, request: Any) -> str:
            return "ok"

    deploy: Callable[..., Any] = serve.deployment(
        num_replicas=REPLICAS,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=1000,
        logging_config={"enable_access_log": False},
    )
    return deploy(Empty).bind()


def make_requests(port: int, tokenizer: Tokenizer, arguments: argparse.Namespace) -> dict[str, list[bytes]]:
    """What each kind of round sends: texts of as many tokens as asked for, all different."""
    sizes = {"max_tokens": arguments.new_tokens, "ignore_eos": True, "temperature": arguments.temperature}
    prompts = make_prompts(tokenizer, arguments.prompt_tokens)
    bodies: list[dict[str, Any]] = [{"model": "quickstart", "prompt": prompt, **sizes} for prompt in prompts]
    paths = {"ours": "/v1/completions", "empty": "/empty", "streamed": "/v1/completions"}
    extra = {"streamed": {"stream": True}}
    return {
        kind: [post(path, port, json.dumps(body | extra.get(kind, {})).encode()) for body in bodies]
        for kind, path in paths.items()
    }


def make_prompts(tokenizer: Tokenizer, tokens: int) -> list[str]:
    """Texts of so many tokens, all different."""
    rng = np.random.default_rng(0)
    prompts: list[str] = []
    while len(prompts) < PROMPTS:
        prompt = tokenizer.decode(rng.integers(300, tokenizer.vocab_size, tokens).tolist())
        if len(tokenizer.encode(prompt)) == tokens:
            prompts.append(prompt)
    return prompts


def measure(port: int, tokenizer: Tokenizer, arguments: argparse.Namespace) -> dict[str, list[Load]]:
    """Rounds in turn, after one of each that does not count."""
    requests = make_requests(port, tokenizer, arguments)
    loads: dict[str, list[Load]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds + 1):
        for kind in KINDS:
            seconds = arguments.seconds if number else min(arguments.seconds, 3.0)
            load = uvloop.run(run_load(port, requests[kind], arguments.clients, seconds, arguments.new_tokens))
            if number:
                loads[kind].append(load)
                rate = len(load.latencies) / load.seconds
                print(f"round {number} {kind}: {rate:.0f} requests/s, {len(load.failures)} failed", flush=True)
    return loads


def summarize(loads: list[Load]) -> dict[str, Any]:
    """Figures of the rounds of one kind; the rate is the median of theirs."""
    rates = [len(load.latencies) / load.seconds for load in loads]
    found: dict[str, Any] = {"rate": statistics.median(rates), "rates": rates}
    for name in ("latencies", "first", "gaps"):
        values = [value for load in loads for value in getattr(load, name)]
        if values:
            found[name] = {"p50": float(np.quantile(values, 0.5)), "p99": float(np.quantile(values, 0.99))}
    failures = [failure for load in loads for failure in load.failures]
    return found | {
        "requests": sum(len(load.latencies) for load in loads),
        "failed": len(failures),
        "failures": failures[:10],
    }


def report(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Print and write the figures."""
    print("\n| | requests/s | p50 ms | p99 ms | first token p50 / p99 ms | per token p50 / p99 ms | failed |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for kind, row in found.items():
        times = [
            " / ".join(f"{row[name][q] * 1e3:.1f}" for q in ("p50", "p99")) if name in row else ""
            for name in ("first", "gaps")
        ]
        p50, p99 = (row["latencies"][q] * 1e3 for q in ("p50", "p99"))
        cells = f"{row['rate']:.0f} | {p50:.1f} | {p99:.1f} | {times[0]} | {times[1]} | {row['failed']}"
        print(f"| {kind} | {cells} |")
    share = found["ours"]["rate"] / found["empty"]["rate"]
    print(f"\nours: {found['ours']['rate']:.1f} requests/s (target: {TARGET_RATE}), ", end="")
    print(f"{share:.1%} of the empty application (target: {TARGET_SHARE:.0%})")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    settings = vars(arguments) | {"cpus": os.cpu_count()}
    text = json.dumps({"settings": settings, "rows": found, "share": share}, indent=1)
    (results / "serve_http.json").write_text(text)
    if any(row["failed"] for row in found.values()):
        raise SystemExit(f"requests failed: {[row['failures'][:2] for row in found.values()]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", help="of the model's application, such as serve.dtype=bfloat16")
    parser.add_argument("--proxy", choices=get_args(Proxy), help="default: HAProxy where there is one")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round")
    parser.add_argument(
        "--hold", action="store_true", help="wait before the first round, to look at the processes"
    )
    main(parser.parse_args())
