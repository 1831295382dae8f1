"""Seconds from the loss of a worker to the next finished step, beside a bare Ray Train restart.

Run `python benchmarks/recovery.py`; `--rounds 5` repeats. Each round kills one of two workers of our run and one
of two workers of a bare TorchTrainer, in turn, on the same local Ray. The bare one is what any restart needs: a
linear layer under DistributedDataParallel, AdamW, reports, `FailureConfig(max_failures=-1)`, no state to load.
Both are asked for their state every 0.25 s.

Ours is split into detection (the loss is known to the controller), restart (new workers train), load (model,
optimizer and data are where they were) and first step, which is the rest.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from moe_ray.telemetry.run_log import read_events, read_metrics

PATIENCE_SECONDS = 120.0
BARE_STEPS = "bare.txt"


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the table and write it as JSON."""
    folder = Path(tempfile.mkdtemp(prefix="recovery-"))
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25"}
    context: Any = ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    rounds: list[dict[str, float]] = []
    try:
        for number in range(arguments.rounds):
            rounds.append(
                measure_ours(folder / f"ours-{number}", arguments) | measure_bare(folder / f"bare-{number}")
            )
            print(json.dumps({name: round(seconds, 2) for name, seconds in rounds[-1].items()}), flush=True)
    finally:
        ray.shutdown()
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    ratio = statistics.median(each["ours"] / each["bare"] for each in rounds)
    print("\n| part | seconds |\n|---|---:|")
    for name in ("detection", "restart", "load", "first step", "ours", "bare"):
        print(f"| {name} | {medians[name]:.1f} |")
    print(f"\nours / bare Ray Train: {ratio:.2f} (target: at most 1.3)")
    results = Path("benchmarks/results")
    results.mkdir(exist_ok=True)
    (results / "recovery.json").write_text(json.dumps({"rounds": rounds, "ratio": ratio}, indent=1))


def measure_ours(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Kill a worker of our run between two checkpoints."""
    run_dir = folder / "runs" / "run"
    command = [sys.executable, "jobs/train.py", arguments.config, f"train.storage={folder / 'runs'}"]
    command += ["train.name=run", "train.steps=100000", "train.log_every=1", "train.eval_every=100000"]
    command += [
        f"data.path={folder.parent / 'data'}",
        "parallel.workers=2",
        "parallel.ep=2",
        "checkpoint.every=10",
    ]
    with _child(command, folder):
        _wait(lambda: any(m["step"] >= 15 for m in read_metrics(run_dir)))
        killed = _kill_a_worker()
        new = _wait(lambda: [m for m in read_metrics(run_dir) if m["resumed_step"] > 0])
        failure, start = (
            next(e["time"] for e in read_events(run_dir) if e["event"] == kind and e["time"] > killed)
            for kind in ("failure", "start")
        )
        first = new[0]
    load = first["restore_seconds"]
    return {
        "detection": failure - killed,
        "restart": start - failure,
        "load": load,
        "first step": first["time"] - start - load,
        "ours": first["time"] - killed,
        "step": first["step_seconds"],
    }


def measure_bare(folder: Path) -> dict[str, float]:
    """Kill a worker of a bare TorchTrainer."""
    steps = folder / BARE_STEPS

    def starts() -> list[float]:
        lines = steps.read_text().splitlines() if steps.exists() else []
        return [float(line.split()[1]) for line in lines if line.split()[0] == "15"]

    with _child([sys.executable, __file__, "--bare", str(folder)], folder):
        _wait(starts)
        killed = _kill_a_worker()
        before = len(steps.read_text().splitlines())
        _wait(lambda: len(steps.read_text().splitlines()) > before + 20)
        lines = [line.split() for line in steps.read_text().splitlines()]
        again = next(float(at) for number, at in lines if number == "1" and float(at) > killed)
    return {"bare": again - killed}


def run_bare(folder: Path) -> None:
    """The driver of the bare run, whose steps begin with 1 at each start."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    scaling: Any = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})
    again: Any = FailureConfig(max_failures=-1)
    run: Any = RunConfig(name="bare", storage_path=str(folder), failure_config=again)
    TorchTrainer(
        _bare_worker,
        train_loop_config={"folder": str(folder)},
        scaling_config=scaling,
        run_config=run,
    ).fit()


def _bare_worker(arguments: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    import torch

    model = ray.train.torch.prepare_model(torch.nn.Linear(1000, 1000))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for step in range(1, 100_000):
        model(torch.ones(8, 1000)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.05)
        if ray.train.get_context().get_world_rank() == 0:
            with (Path(arguments["folder"]) / BARE_STEPS).open("a") as file:
                file.write(f"{step} {time.time()}\n")
        if step % 10 == 0:
            ray.train.report({"step": step})


class _child:  # noqa: N801
    """A driver that is ended, with its workers, at the end of the block."""

    def __init__(self, command: list[str], folder: Path) -> None:
        folder.mkdir(parents=True)
        self._log = (folder / "driver.log").open("w")
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()
        psutil.wait_procs(_workers(), timeout=30)


def _workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        # One may end while it is looked at.
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(child.cmdline()[:1]):
                found.append(child)
    return found


def _kill_a_worker() -> float:
    _workers()[-1].send_signal(signal.SIGKILL)
    return time.time()


def _wait(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            raise TimeoutError("the run did not get there; see driver.log")
        time.sleep(0.02)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="jobs/configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare is not None:
        run_bare(options.bare)
    else:
        main(options)
