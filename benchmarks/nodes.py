"""Replicas, nodes and an elastic training run that share a cluster, under a load that rises and falls.

Run `python benchmarks/nodes.py`. A local cluster with Ray's true autoscaler serves an application that holds
each request for a while, scaled by our policy, and trains a tiny model on spot nodes. Then the load comes:
replicas, then nodes, then the limit of nodes, so that training makes way. A spot node with workers and replicas is
killed. The load goes: replicas, then nodes go, and training comes back. At the end its samples and losses are
compared with an undisturbed run of one process. All run on this machine, the load included.

Targets: no failed request, no lost sample, losses of the undisturbed run.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import uvloop
from patient_clients import Answers, Crowd
from serve_http import ROOT
from shared_cluster import LEAST_REPLICAS, Look, Story, deploy, heed_sigterm, training_settings

from cluster.nodes import running_nodes
from cluster.preempt import lose
from moe_ray.telemetry.run_log import read_events, read_metrics


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
    heed_sigterm()
    with tempfile.TemporaryDirectory(prefix="no-", dir="/tmp") as name:  # nosec B108
        story = Story(Path(name), options)
        try:
            story.start()
            seconds, answers = uvloop.run(live(story))
        finally:
            story.stop()
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
