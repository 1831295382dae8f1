"""Replicas under a load that is stepped from 1 to 400 clients and back, and under kills.

Run `python benchmarks/autoscale.py`; `--kill 5` kills a random replica every 5 s. A Ray of its own with logical
CPUs and HAProxy serves a model smaller than the quickstart's with random weights, first scaled by Serve's default
policy (ongoing requests) with our options, then by ours. Clients keep their connections, think for a while after
each answer, and try a failed request again as the `openai` client does. All run on this machine, the load
included; replicas import torch, so starting 14 of them takes most of its processors for a while.

Targets: the first decision within 5 s, no change of direction at steady load, no failed request.
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import uvloop
from http_load import post
from patient_clients import Answers, Crowd
from serve_http import ROOT, make_model, make_prompts, start_serve

from cluster.head import Head
from cluster.local import ClusterError, LocalCluster, Proxy
from cluster.processes import find_marked

TARGET_DECISION_SECONDS = 5.0
POLICIES = ("serve", "ours")
APPLICATION = "moe_lm"
# So that two processors carry 400 clients.
SMALL = ("model.dim=64", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1", "model.expert_dim=64")
_LOOK_SECONDS = 0.5
_ROW_SECONDS = 10.0


@dataclass(frozen=True)
class Look:
    """What was seen of the replicas; time in seconds from the first request."""

    time: float
    clients: int
    wanted: int
    running: int


class Deployment:
    """One application on the cluster, as the dashboard shows it."""

    def __init__(self, cluster: LocalCluster, head: Head) -> None:
        self._cluster, self._head = cluster, head

    def look(self) -> tuple[int, list[int]]:
        """The replicas that are wanted, and the processes of those that run."""
        applications = self._cluster.get(self._head, "/api/serve/applications/")["applications"]
        deployment = applications[APPLICATION]["deployments"]["LanguageModel"]
        pids = [replica["pid"] for replica in deployment["replicas"] if replica["state"] == "RUNNING"]
        return deployment["target_num_replicas"], pids

    def kill(self, rng: np.random.Generator) -> None:
        """Kill a random replica, which must be a process of this cluster."""
        own = {process.pid for process in find_marked(self._head.temp_dir)}
        candidates = sorted(own.intersection(self.look()[1]))
        if candidates:
            # It may have ended meanwhile.
            with suppress(ProcessLookupError):
                os.kill(int(rng.choice(candidates)), signal.SIGKILL)


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and write them as JSON."""
    with tempfile.TemporaryDirectory(prefix="as-", dir="/tmp") as name:  # nosec B108
        folder = Path(name)
        tokenizer = make_model(folder / "quickstart", *SMALL)
        cluster = LocalCluster(folder / "cluster")
        try:
            head = cluster.start(arguments.most + 4, arguments.proxy)
            os.environ.update(cluster.environment(head))
            port = start_serve()
            sizes = {"max_tokens": arguments.new_tokens, "ignore_eos": True, "temperature": 0.0}
            bodies = [{"model": "quickstart", "prompt": p, **sizes} for p in make_prompts(tokenizer, 16)]
            requests = [post("/v1/completions", port, json.dumps(body).encode()) for body in bodies]
            found = {}
            for policy in arguments.policies:
                deploy(folder / "quickstart", policy, arguments.most)
                crowd = Crowd(port, requests, arguments.think)
                began = time.perf_counter()
                looks = uvloop.run(measure(Deployment(cluster, head), crowd, arguments))
                report(policy, looks, crowd.answers, began)
                found[policy] = summarize(looks, crowd.answers, arguments)
        finally:
            cluster.stop()
    compare(found, arguments)


def deploy(model: Path, policy: str, most: int) -> None:
    """Serve the model, scaled by one of the policies, in place of what was served before."""
    from ray import serve
    from ray.serve.config import AutoscalingPolicy

    from moe_ray.config import TelemetryConfig
    from moe_ray.serve_config import ServeConfig
    from moe_ray.serving.deployment import LanguageModel, deployment_options

    config = ServeConfig(min_replicas=2, max_replicas=most, weights_folder=str(model.parent / "weights"))
    options = deployment_options(config)
    if policy == "serve":
        delays = {"policy": AutoscalingPolicy(), "downscale_delay_s": config.scale_down_seconds}
        options["autoscaling_config"] = options["autoscaling_config"].model_copy(update=delays)
    with suppress(KeyError):
        serve.delete(APPLICATION)
    application = serve.deployment(name="LanguageModel", **options)(LanguageModel).bind(
        str(model), config, TelemetryConfig()
    )
    serve.run(application, name=APPLICATION, route_prefix="/")


async def measure(deployment: Deployment, crowd: Crowd, arguments: argparse.Namespace) -> list[Look]:
    """Step the load, look at the replicas, and kill some."""
    began, looks, clients = time.perf_counter(), [], 1

    async def watch() -> None:
        while True:
            # A dashboard that has no processor answers late.
            with suppress(ClusterError):
                wanted, pids = await asyncio.to_thread(deployment.look)
                looks.append(Look(time.perf_counter() - began, clients, wanted, len(pids)))
            await asyncio.sleep(_LOOK_SECONDS)

    async def kill() -> None:
        rng = np.random.default_rng(0)
        while arguments.kill:
            await asyncio.sleep(arguments.kill)
            with suppress(ClusterError):
                await asyncio.to_thread(deployment.kill, rng)

    tasks = [asyncio.create_task(watch()), asyncio.create_task(kill())]
    for clients, seconds in zip((1, arguments.clients, 1), arguments.seconds, strict=True):
        await crowd.resize(clients)
        await asyncio.sleep(seconds)
        for task in tasks:
            if task.done() and task.exception():
                task.result()
    for task in tasks:
        task.cancel()
    await crowd.resize(0)
    return looks


def summarize(looks: list[Look], answers: Answers, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures of one policy; times in seconds from the step of the load, None: never."""
    low, high, _ = arguments.seconds
    least = looks[0].wanted
    up = [look for look in looks if low <= look.time < low + high]
    down = [look for look in looks if look.time >= low + high]
    most = max(look.wanted for look in up)
    return {
        "decided": _first(up, lambda look: look.wanted > least),
        "decided_all": _first(up, lambda look: look.wanted == most),
        "all_running": _first(up, lambda look: look.running == most),
        "most": most,
        "back": _first(down, lambda look: look.wanted == least),
        "turns_at_steady_load": turns([look.wanted for look in up]),
        "requests": len(answers.latencies),
        "failures": dict(answers.failures),
        "given_up": dict(answers.given_up),
        "samples": answers.samples,
        "looks": [asdict(look) for look in looks],
    }


def _first(looks: list[Look], holds: Any) -> float | None:
    return next((look.time - looks[0].time for look in looks if holds(look)), None)


def turns(wanted: list[int]) -> int:
    """Changes of direction."""
    signs = [1 if after > before else -1 for before, after in itertools.pairwise(wanted) if after != before]
    return sum(first != second for first, second in itertools.pairwise(signs))


def report(policy: str, looks: list[Look], answers: Answers, began: float) -> None:
    """Print what happened in the course of time."""
    print(f"\n{policy}\n\n| s | clients | replicas wanted | running | requests/s | p50 ms | p99 ms |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for start in np.arange(0, looks[-1].time, _ROW_SECONDS):
        look = next(look for look in looks if look.time >= start)
        seconds = [s for at, s in answers.latencies if start <= at - began < start + _ROW_SECONDS]
        p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3 if seconds else (np.nan, np.nan)
        cells = (look.clients, look.wanted, look.running, len(seconds) / _ROW_SECONDS, p50, p99)
        print(f"| {start:.0f} | {' | '.join(f'{cell:.0f}' for cell in cells)} |", flush=True)


def compare(found: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print and write the figures of all policies."""
    targets = {"decided": TARGET_DECISION_SECONDS, "turns_at_steady_load": 0, "failed": 0, "given_up": 0}
    rows = {
        "most": "replicas at most",
        "decided": "first decision, s",
        "decided_all": "last decision up, s",
        "all_running": "all running, s",
        "back": "decided to go back, s",
        "turns_at_steady_load": "changes of direction at steady load",
        "requests": "requests that succeeded",
        "failed": "failed answers",
        "given_up": "failed requests, after the retries of the openai client",
    }
    print("\n| | " + " | ".join(found) + " | target | ratio |\n|---|" + "---:|" * (len(found) + 2))
    cells = {
        policy: {**row, "failed": sum(row["failures"].values()), "given_up": sum(row["given_up"].values())}
        for policy, row in found.items()
    }
    for name, title in rows.items():
        values = [row[name] for row in cells.values()]
        ratio = f"{values[-1] / values[0]:.2f}" if len(values) > 1 and values[0] and values[-1] is not None else ""
        shown = ["" if value is None else f"{value:.1f}".removesuffix(".0") for value in values]
        print(f"| {title} | {' | '.join(shown)} | {targets.get(name, '')} | {ratio} |")
    for policy, row in found.items():
        print(f"\n{policy}: failed answers by kind {row['failures']}, after retries {row['given_up']}")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    file = results / ("autoscale_kill.json" if arguments.kill else "autoscale.json")
    file.write_text(json.dumps({"settings": vars(arguments) | {"cpus": os.cpu_count()}, "rows": found}, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--clients", type=int, default=400)
    parser.add_argument("--most", type=int, default=16, help="replicas")
    parser.add_argument("--think", type=float, default=0.5, help="mean seconds between answer and next request")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument(
        "--seconds", type=float, nargs=3, default=[15, 120, 60], help="of each step of the load", metavar="S"
    )
    parser.add_argument("--kill", type=float, default=0.0, help="seconds between two kills; 0: none")
    parser.add_argument("--proxy", choices=get_args(Proxy), help="default: HAProxy where there is one")
    main(parser.parse_args())
