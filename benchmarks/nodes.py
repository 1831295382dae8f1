"""Replicas, nodes and an elastic training run that share a cluster, under a load that rises and falls.

Run `python benchmarks/nodes.py`. A local cluster with Ray's true autoscaler serves an application that holds
each request for a while, scaled by our policy, and trains a tiny model on spot nodes. Then the load comes:
replicas, then nodes, then the limit of nodes, so that training makes way. A spot node with workers and replicas is
killed. The load goes: replicas, then nodes go, and training comes back. At the end its samples and losses are
compared with an undisturbed run of one process. All run on this machine, the load included.

Targets: no failed request, no lost sample, losses of the undisturbed run. `--model` serves a language model
instead; its replicas import torch, which takes two processors a minute or more.
"""

import argparse
import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop
import yaml
from http_load import post
from patient_clients import Answers, Crowd
from serve_http import ROOT, make_model

from cluster.head import LOOPBACK, Head, free_port
from cluster.local import ClusterError, LocalCluster
from cluster.nodes import NodePlan, running_nodes
from cluster.preempt import lose
from moe_ray.telemetry.run_log import read_events, read_metrics

APPLICATION = "endpoint"
LEAST_REPLICAS = 2
PATIENCE_SECONDS = 900.0
_LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Look:
    """What was seen; time in seconds since the epoch.

    Attributes:
        wanted: replicas.
        running: replicas that answer.
        nodes: that are alive, beside the head.
        world: workers of the last logged step of training.
        step: the last logged one.
    """

    time: float
    wanted: int
    running: int
    nodes: int
    world: int
    step: int


class Story:
    """The cluster, the endpoint and the training run."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options, self.folder = options, folder
        self.cluster = LocalCluster(folder / "cluster")
        self.run_dir = folder / "runs" / "shared"
        self.looks: list[Look] = []
        self.head: Head

    def start(self) -> None:
        """Start the cluster, and Serve with its proxy on the head: all nodes have this machine's ports."""
        self.head = self.cluster.start(nodes=NodePlan(**self.options.plan))
        os.environ.update(self.cluster.environment(self.head))
        # Not before: it reads some of these variables when it is imported.
        import ray
        from ray import serve

        ray.init(log_to_driver=False, logging_level=logging.ERROR)
        # Ray has just put its own in place.
        _heed_sigterm()
        self.port = free_port(28_000)
        serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": self.port})

    def train(self) -> subprocess.Popen[bytes]:
        """Start the training run, which goes on until it is asked to end."""
        file = self.folder / "train.yaml"
        file.write_text(yaml.safe_dump(training_settings(self.folder, self.options)), encoding="utf-8")
        with (self.folder / "train.log").open("wb") as log:
            return subprocess.Popen([sys.executable, "jobs/train.py", str(file)], cwd=ROOT, stdout=log, stderr=log)

    def look(self) -> Look:
        """The state of all, now."""
        import ray

        deployments = self.cluster.get(self.head, "/api/serve/applications/")["applications"]
        (deployment,) = deployments[APPLICATION]["deployments"].values()
        running = sum(replica["state"] == "RUNNING" for replica in deployment["replicas"])
        nodes = sum(node["Alive"] for node in ray.nodes()) - 1
        last = (read_metrics(self.run_dir) or [{"world_size": 0, "step": 0}])[-1]
        return Look(
            time.time(), deployment["target_num_replicas"], running, nodes, last["world_size"], last["step"]
        )

    async def watch(self) -> None:
        """Look again and again."""
        while True:
            # A dashboard that has no processor answers late.
            with suppress(ClusterError):
                self.looks.append(await asyncio.to_thread(self.look))
            await asyncio.sleep(_LOOK_SECONDS)

    async def until(self, what: str, holds: Callable[[Look], bool], since: float) -> Look:
        """The first look after a time of which something is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            found = next((look for look in self.looks if look.time >= since and holds(look)), None)
            if found:
                print(f"[{found.time - self.looks[0].time:5.0f} s] {what}: {found}", flush=True)
                return found
            await asyncio.sleep(_LOOK_SECONDS / 2)
        raise TimeoutError(f"not within {PATIENCE_SECONDS:.0f} s: {what}; {self.looks[-1:]}")


def training_settings(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A model whose steps take a tenth of a second. Routing by hash: no rounding can decide it otherwise."""
    model: dict[str, Any] = {
        "vocab_size": 512,
        "dim": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "num_experts": 4,
    }
    model |= {"top_k": 2, "expert_dim": 64, "max_sequence_length": 64, "router": "hash"}
    return {
        "model": model,
        "data": {
            "sources": [f"docs={ROOT}/docs/*.md"],
            "sequence_length": 32,
            "validation_fraction": 0.2,
            "path": str(folder / "data"),
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "train": {
            "name": "shared",
            "storage": str(folder / "runs"),
            "steps": 100_000,
            "global_batch": 48,
            "micro_batch": 2,
            "log_every": 1,
            "eval_every": 100_000,
            "eval_batches": 1,
        },
        "checkpoint": {"every": 10},
        "parallel": {
            "workers": [1, options.workers],
            "ep": "auto",
            "resources": {"spot": 1},
            "yield_after_seconds": 2,
            "return_after_seconds": 10,
            "grow_after_seconds": 5,
            "timeout_seconds": 60,
        },
    }


def deploy(story: Story) -> list[bytes]:
    """Serve, scaled by our policy; returns the requests to send."""
    from ray import serve

    from moe_ray.serve_config import ServeConfig
    from moe_ray.serving.autoscaling import make_autoscaling_config

    options = story.options
    limits = {"min_replicas": LEAST_REPLICAS, "max_replicas": options.replicas, "scale_down_seconds": 10}
    if options.model:
        from serve_apps.moe_lm import build

        small = ("model.dim=64", "model.num_layers=2", "model.num_heads=2", "model.num_kv_heads=1")
        make_model(story.folder / "tiny", *small, "model.expert_dim=64")
        arguments = {f"serve.{name}": str(value) for name, value in limits.items()}
        arguments["serve.weights_folder"] = str(story.folder / "weights")
        serve.run(build({"checkpoint": str(story.folder / "tiny"), **arguments}), name=APPLICATION)
        body = {"model": "tiny", "prompt": "the cat", "max_tokens": 32, "ignore_eos": True}
        return [post("/v1/completions", story.port, json.dumps(body).encode())]
    application = serve.deployment(
        name="Holder",
        ray_actor_options={"num_cpus": 1},
        autoscaling_config=make_autoscaling_config(ServeConfig(**limits)),
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=60,
        health_check_period_s=2,
        logging_config={"enable_access_log": False},
    )(_holder())
    serve.run(application.bind(), name=APPLICATION)
    return [post("/", story.port, b"{}")]


def _holder() -> type:
    from starlette.responses import PlainTextResponse

    class Holder:
        """Holds each request for a second, as an engine of a model would."""

        def __init__(self) -> None:
            self.held = 0

        async def __call__(self, request: Any) -> PlainTextResponse:
            self.held += 1
            try:
                await asyncio.sleep(1.0)
            finally:
                self.held -= 1
            return PlainTextResponse("done")

        def record_autoscaling_stats(self) -> dict[str, float]:
            return {"requests": float(self.held), "queued_tokens": 0.0}

    return Holder


async def live(story: Story) -> tuple[dict[str, float], Answers]:
    """Let the load come, take a node away, let the load go; returns seconds and what clients saw."""
    options, began = story.options, time.time()
    requests = await asyncio.to_thread(deploy, story)
    watch = asyncio.create_task(story.watch())
    crowd = Crowd(story.port, requests, think_seconds=0.2)
    await crowd.resize(1)
    await story.until("replicas idle", lambda look: look.running == LEAST_REPLICAS, began)
    job, asked = await asyncio.to_thread(story.train), time.time()
    try:
        trained = await story.until("training", lambda look: look.world == options.workers, asked)
        loaded, before = time.time(), story.looks[-1]
        await crowd.resize(options.clients)
        wanted = await story.until("replicas wanted", lambda look: look.wanted > LEAST_REPLICAS, loaded)
        grown = await story.until("a node more", lambda look: look.nodes > before.nodes, loaded)
        more = await story.until("replicas come", lambda look: look.running > LEAST_REPLICAS, loaded)
        all_run = await story.until("all replicas", lambda look: look.running == options.replicas, loaded)
        await story.until("fewer workers train", lambda look: 0 < look.world < options.workers, loaded)
        lost_at, step = time.time(), story.looks[-1].step
        await asyncio.to_thread(_lose_a_spot_node, story)
        missed = await story.until("loss", lambda look: look.running < options.replicas, lost_at)
        again = await story.until("all replicas", lambda look: look.running == options.replicas, missed.time)
        trains = await story.until("training goes on", lambda look: _goes_on(story, look, step, lost_at), lost_at)
        gone = time.time()
        await crowd.resize(1)
        fewer = await story.until("fewer replicas", lambda look: look.running == LEAST_REPLICAS, gone)
        small = await story.until("fewer nodes", lambda look: look.nodes <= before.nodes, gone)
        back = await story.until("training is back", lambda look: look.world == options.workers, gone)
        await crowd.resize(0)
        await asyncio.to_thread(_end, job)
    finally:
        watch.cancel()
        _end(job)
    seconds = {
        "training has its workers": trained.time - asked,
        "load to first decision": wanted.time - loaded,
        "load to a node more": grown.time - loaded,
        "load to a replica more": more.time - loaded,
        "load to the workers' making way": _event(story, "yield", loaded) - loaded,
        "load to all replicas": all_run.time - loaded,
        "spot loss to all replicas again": again.time - lost_at,
        "spot loss to the next step": trains.time - lost_at,
        "end of load to least replicas": fewer.time - gone,
        "end of load to nodes as before": small.time - gone,
        "end of load to all workers": back.time - gone,
    }
    return seconds, crowd.answers


def _lose_a_spot_node(story: Story) -> None:
    lose([node for node in running_nodes(story.head.temp_dir) if node.group == "spot"][-1])


def _goes_on(story: Story, look: Look, step: int, since: float) -> bool:
    return look.step > step and any(
        e["event"] == "start" and e["time"] > since for e in read_events(story.run_dir)
    )


def _event(story: Story, kind: str, since: float) -> float:
    times = [event["time"] for event in read_events(story.run_dir) if event["event"] == kind]
    return next((at for at in times if at >= since), float("nan"))


def _end(job: subprocess.Popen[bytes]) -> None:
    """Let the run save and end."""
    job.send_signal(signal.SIGTERM)
    try:
        job.wait(120)
    except subprocess.TimeoutExpired:
        for process in [*psutil.Process(job.pid).children(recursive=True), job]:
            process.kill()
        job.wait()


def compare(story: Story) -> dict[str, Any]:
    """Samples and losses of the run beside those of an undisturbed one."""
    from moe_ray.config import build_config
    from moe_ray.cpu import set_threads
    from moe_ray.data.prepare import prepare
    from moe_ray.parallel.mesh import build_mesh
    from moe_ray.training.chaos.report import differing_steps, loss_difference
    from moe_ray.training.loop import train
    from moe_ray.training.requests import Request, ask

    found = read_metrics(story.run_dir)
    overrides = ["train.name=undisturbed", "parallel.workers=1", "parallel.yield_after_seconds=null"]
    config = build_config(training_settings(story.folder, story.options), overrides)
    config.train.run_dir.mkdir(parents=True)
    most = found[-1]["step"]

    def report(metrics: dict[str, Any]) -> None:
        if metrics["step"] >= most:
            ask(Request.STOP)

    set_threads(1)
    train(config, build_mesh(1), prepare(config), report)
    expected = [line for line in read_metrics(config.train.run_dir) if line["step"] <= most]
    return {
        "steps": len(found),
        "lost": len(differing_steps(expected, found)),
        "repeated": len(found) - len({line["step"] for line in found}),
        "loss_difference": loss_difference(expected, found).largest,
        "redone": sum(_redone(found)),
        "worlds": sorted({line["world_size"] for line in found}),
    }


def _redone(metrics: list[dict[str, Any]]) -> list[int]:
    """Of each start of the workers, the steps that it did again."""
    starts = {(line["resumed_step"], line["redone_steps"]) for line in metrics}
    return [redone for _, redone in starts]


def report(seconds: dict[str, float], answers: Answers, training: dict[str, Any], looks: list[Look]) -> None:
    """Print what came of it."""
    print("\n| from … to … | seconds |\n|---|---:|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} |")
    print("\n| | | target |\n|---|---:|---:|")
    rows = [
        ("replicas, least and most", f"{LEAST_REPLICAS} to {max(look.running for look in looks)}", ""),
        ("nodes, least and most", f"{min(x.nodes for x in looks)} to {max(x.nodes for x in looks)}", ""),
        ("training workers", ", ".join(map(str, training["worlds"])), ""),
        ("requests that succeeded", f"{len(answers.latencies):,}", ""),
        ("failed answers", sum(answers.failures.values()), 0),
        ("failed requests, after the retries of the openai client", sum(answers.given_up.values()), 0),
        ("training steps", training["steps"], ""),
        ("steps with lost or other samples", training["lost"], 0),
        ("steps done again after the spot loss", training["redone"], ""),
        ("largest relative difference of a loss", f"{training['loss_difference']:.1e}", "1e-4"),
    ]
    for title, value, target in rows:
        print(f"| {title} | {value} | {target} |")
    print(f"\nfailed answers by kind {dict(answers.failures)}; {answers.samples}", flush=True)


def main(options: argparse.Namespace) -> None:
    """Measure, print the tables and write them as JSON."""
    _heed_sigterm()
    with tempfile.TemporaryDirectory(prefix="no-", dir="/tmp") as name:  # nosec B108
        story = Story(Path(name), options)
        try:
            story.start()
            seconds, answers = uvloop.run(live(story))
        finally:
            story.cluster.stop()
        training = compare(story)
        events = read_events(story.run_dir)
    report(seconds, answers, training, story.looks)
    found = {
        "settings": vars(options) | {"cpus": os.cpu_count()},
        "seconds": seconds,
        "requests": len(answers.latencies),
        "failures": dict(answers.failures),
        "given_up": dict(answers.given_up),
        "training": training,
        "events": events,
        "looks": [asdict(look) for look in story.looks],
    }
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1, default=str), encoding="utf-8")


def _heed_sigterm() -> None:
    """So that the cluster is stopped then, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def parse() -> argparse.Namespace:
    """Options of the command line; `plan` is that of the nodes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=16, help="most")
    parser.add_argument("--clients", type=int, default=80)
    parser.add_argument("--workers", type=int, default=4, help="most that train")
    parser.add_argument("--cpus-per-node", type=int, default=6)
    parser.add_argument("--nodes", type=int, default=2, help="most that stay, least 1")
    parser.add_argument("--spot-nodes", type=int, default=2, help="most")
    parser.add_argument("--max-nodes", type=int, default=3, help="of both kinds")
    parser.add_argument("--idle-seconds", type=float, default=15)
    parser.add_argument("--model", action="store_true", help="serve a tiny language model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "nodes.json")
    options = parser.parse_args()
    options.plan = {
        "cpu": (1, options.nodes),
        "spot": (0, options.spot_nodes),
        "most": options.max_nodes,
        "cpus_per_node": options.cpus_per_node,
        "idle_seconds": options.idle_seconds,
    }
    return options


if __name__ == "__main__":
    main(parse())
