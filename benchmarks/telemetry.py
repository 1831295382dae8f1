"""What metrics and logs cost: the share of a training step, of a request, and of a processor in the background.

Run `python benchmarks/telemetry.py`. Steps are those of jobs/configs/quickstart.yaml on one worker. What a record
costs is measured in a process of a Ray cluster of its own, for that model and one of 32 layers of 64 experts, once
with the metrics for Ray alone and once with TensorBoard's thread. All times are those of a processor, which other
load on the machine changes little. Targets: 1% of a step and of a request.
"""

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")

import ray

from moe_ray.config import Config, load_config
from moe_ray.cpu import set_threads
from moe_ray.data.prepare import prepare
from moe_ray.parallel.mesh import build_mesh
from moe_ray.ray_metrics import RayMetrics
from moe_ray.serving.affinity.stats import AffinityStats
from moe_ray.serving.engine.stats import EngineStats
from moe_ray.serving.metrics import Growth, Metrics
from moe_ray.serving.usage import Usage
from moe_ray.storage import open_storage
from moe_ray.telemetry.logs import setup_logging
from moe_ray.telemetry.samples import training_samples
from moe_ray.telemetry.trackers.follow import follow_run
from moe_ray.training.loop import train

_CONFIG = "jobs/configs/quickstart.yaml"
# Of a processor, in a replica behind Serve: docs/benchmarks.md.
_REQUEST_SECONDS = 1.3e-3
_INTERVAL_SECONDS = 5.0


def train_for_records(folder: Path) -> tuple[Config, dict[str, Any], float]:
    """A short training in this process on one thread; its last record, and processor seconds of a step."""
    set_threads(1)
    overrides = [
        "parallel.workers=1",
        "parallel.ep=1",
        "train.steps=20",
        "train.eval_batches=1",
        f"train.storage={folder}",
    ]
    config = load_config(_CONFIG, [*overrides, "optim.warmup_steps=2"])
    records: list[tuple[float, dict[str, Any]]] = []
    config.train.run_dir.mkdir(parents=True)
    train(config, build_mesh(1), prepare(config), lambda record: records.append((time.process_time(), record)))
    (began, _), (ended, record) = records
    return config, record, (ended - began) / config.train.log_every


def widen(record: dict[str, Any], layers: int, experts: int) -> dict[str, Any]:
    """The record of a model with more layers and experts."""
    by_layer = {name: [value[0]] * layers for name, value in record.items() if name.endswith("_by_layer")}
    return record | by_layer | {"load_by_layer": [[1 / experts] * experts] * layers}


class _Process:
    """One of Ray's, where metrics are measured."""

    def record_cost(self, record: dict[str, Any], config: Config, rounds: int) -> float:
        """Processor seconds of all threads for one record, its trackers included."""
        sender = RayMetrics()
        config.train.run_dir.mkdir(parents=True, exist_ok=True)
        sender.send(training_samples(record, config))
        with follow_run(config, open_storage(config.train.run_dir)) as track:
            track(record)
            time.sleep(3)
            began = time.process_time()
            for step in range(rounds):
                sender.send(training_samples(record, config))
                track(record | {"step": record["step"] + step})
        return (time.process_time() - began) / rounds

    def idle_share(self, seconds: float) -> float:
        """Of a processor: what Ray's threads use to send what has been set."""
        began = time.process_time()
        time.sleep(seconds)
        return (time.process_time() - began) / seconds

    def replica_costs(self, requests: int, rounds: int) -> tuple[float, float]:
        """Processor seconds of a report without requests, and of each request that it tells of."""
        metrics, growth, sender = Metrics("r", [AffinityStats()]), Growth(), RayMetrics()
        metrics.watch(EngineStats)

        def report(count: int) -> float:
            for number in range(count):
                usage = Usage(prompt_tokens=100, completion_tokens=20)
                metrics.count("/v1/completions", "200", usage, 0.01 * (number % 50), 0.01)
            began = time.thread_time()
            sender.send(growth.samples(metrics.families()))
            return time.thread_time() - began

        report(1)
        empty = statistics.median(report(0) for _ in range(rounds))
        return empty, (statistics.median(report(requests) for _ in range(rounds)) - empty) / requests


Process: Any = ray.remote(num_cpus=0)(_Process)


def log_costs(rounds: int) -> dict[str, float]:
    """Processor seconds of a line that is written, by form."""
    logger = logging.getLogger("moe_ray.benchmark")
    costs = {}
    for form in ("text", "json"):
        setup_logging(load_config(_CONFIG, [f"telemetry.log_format={form}"]).telemetry, run="r", rank=0)
        with Path(os.devnull).open("w") as sink:
            logging.getLogger("moe_ray").handlers[0].setStream(sink)  # ty: ignore
            began = time.process_time()
            for number in range(rounds):
                # Letters, so that no line is a repetition.
                text = f"{number:b}".translate({48: "a", 49: "b"})
                logger.info("rank %s resumed from step %d of s3://bucket/run?region=x", text, number)
            costs[form] = (time.process_time() - began) / rounds
    return costs


def main(arguments: argparse.Namespace) -> None:
    """Print the shares."""
    rows: dict[str, tuple[str, float | None]] = {}
    with tempfile.TemporaryDirectory(prefix="mt-", dir="/tmp") as folder:  # nosec B108
        config, record, step = train_for_records(Path(folder) / "runs")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100_000_000,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=f"{folder}/ray",
        )
        try:
            rows |= training_rows(config, record, step, arguments)
            process = Process.remote()
            empty, each = ray.get(process.replica_costs.remote(arguments.requests, 20))
            rows["a report of a replica, every 5 s"] = (f"{empty * 1e3:.2f} ms", empty / _INTERVAL_SECONDS)
            rows["each request in it, of 1.3 ms"] = (f"{each * 1e6:.1f} us", each / _REQUEST_SECONDS)
        finally:
            ray.shutdown()
    for form, seconds in log_costs(5000).items():
        rows[f"a line of log, {form}"] = (f"{seconds * 1e6:.0f} us", None)
    print(f"a step takes {step * 1e3:.0f} ms of a processor, and a record is of {config.train.log_every} steps\n")
    print("| what | costs | share |\n|---|---:|---:|")
    for name, (cost, share) in rows.items():
        print(f"| {name} | {cost} | {'' if share is None else f'{share:.3%}'} |")
    print("\ntargets: 1% of a step, 1% of a request")
    results = Path("benchmarks/results")
    results.mkdir(exist_ok=True)
    (results / "telemetry.json").write_text(json.dumps({"step_seconds": step, "rows": rows}, indent=1))


def training_rows(
    config: Config, record: dict[str, Any], step: float, arguments: argparse.Namespace
) -> dict[str, tuple[str, float | None]]:
    """What records of two models cost, with TensorBoard and without."""
    rows: dict[str, tuple[str, float | None]] = {}
    large = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 32})})
    for name, each, its_record in (
        ("4 layers of 8 experts", config, record),
        ("32 layers of 64", large, widen(record, 32, 64)),
    ):
        process = Process.remote()
        bare = ray.get(process.idle_share.remote(arguments.seconds))
        cost = ray.get(process.record_cost.remote(its_record, each, 100))
        idle = ray.get(process.idle_share.remote(arguments.seconds)) - bare
        rows[f"a record, {name}"] = (f"{cost * 1e3:.2f} ms", cost / step / config.train.log_every)
        rows[f"Ray sending it on, {name}"] = (f"{idle * 1e3:.2f} ms a second", max(idle, 0.0))
        telemetry = config.telemetry.model_copy(update={"trackers": ("tensorboard",)})
        tracked = each.model_copy(update={"telemetry": telemetry})
        cost = ray.get(Process.remote().record_cost.remote(its_record, tracked, 100))
        rows[f"a record with TensorBoard, {name}"] = (f"{cost * 1e3:.2f} ms", cost / step / config.train.log_every)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000, help="requests between two reports of a replica")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long Ray's threads are watched")
    main(parser.parse_args())
