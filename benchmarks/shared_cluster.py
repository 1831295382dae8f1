"""A cluster with nodes that come and go, what an endpoint and a training run do on it, and what is seen of it."""

import argparse
import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from http_load import post
from serve_http import ROOT

from cluster.head import LOOPBACK, Head, free_port
from cluster.local import ClusterError, LocalCluster
from cluster.nodes import NodePlan
from moe_ray.telemetry.run_log import read_metrics

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
        heed_sigterm()
        self.port = free_port(28_000)
        serve.start(proxy_location="HeadOnly", http_options={"host": LOOPBACK, "port": self.port})

    def stop(self) -> None:
        """End all; a driver that stayed would be ended by Ray a minute later."""
        import ray

        ray.shutdown()
        self.cluster.stop()

    def train(self) -> subprocess.Popen[bytes]:
        """Start the training run, which goes on until it is asked to end."""
        # The undisturbed run reads them again, and somebody may write meanwhile.
        shutil.copytree(ROOT / "docs", self.folder / "docs")
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
            "sources": [f"docs={folder}/docs/*.md"],
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

    limits = {"min_replicas": LEAST_REPLICAS, "max_replicas": story.options.replicas, "scale_down_seconds": 10}
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


def heed_sigterm() -> None:
    """So that the cluster is stopped then, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
