"""An ASHA sweep of the quickstart's model under kills, and population-based training beside random search.

Run `python benchmarks/sweep.py`. The sweep is `jobs/configs/sweep.yaml` with fewer steps: its first trial is the
default configuration. A worker of its third trial and, after half of the trials, its driver are SIGKILLed; the
same command goes on. Then a population and as many trials of a random search, which begin with the same values and
seeds, train as many steps each. Shown are steps spent, the best objective beside the default's, and what the kills
cost.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import ray

from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import read_events
from moe_ray.tuning.trials import Trial, read_trials

CONFIG = "jobs/configs/sweep.yaml"
GENERATIONS = 3
SPACE = (
    "{optim.lr: {loguniform: [1.0e-3, 2.0e-2]}, optim.weight_decay: {uniform: [0.01, 0.2]}, "
    "model.load_balancing_loss_weight: {loguniform: [3.0e-3, 1.0e-1]}}"
)


def main(arguments: argparse.Namespace) -> None:
    """Measure, print the tables and write them as JSON."""
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="sweep-"))
    os.environ |= {"RAY_AUTH_MODE": "disabled"}
    context: Any = ray.init(address="local", num_cpus=16, include_dashboard=True, log_to_driver=False)
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    try:
        found: dict[str, list[dict[str, Any]]] = {"asha": [], "pbt": []}
        if arguments.only != "pbt":
            found["asha"].append(measure_asha(folder, arguments))
            print(json.dumps(found["asha"][-1], indent=1), flush=True)
        for seed in range(arguments.seeds if arguments.only != "asha" else 0):
            found["pbt"].append(measure_population(folder, arguments, seed))
            print(json.dumps(found["pbt"][-1], indent=1), flush=True)
    finally:
        ray.shutdown()
    results = Path("benchmarks/results")
    results.mkdir(exist_ok=True)
    (results / "sweep.json").write_text(json.dumps(found, indent=1))


def measure_asha(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A sweep whose worker and driver are killed."""
    steps, began = arguments.steps, time.monotonic()
    command = _command(
        folder, "asha", steps, f"sweep.grace_steps={steps // 9}", f"sweep.concurrent={arguments.concurrent}"
    )
    storage = open_storage(folder / "asha")
    sweep = subprocess.Popen(command)
    _wait(lambda: _steps(read_trials(storage), 2) >= steps // 9, sweep)
    _train_workers()[0].send_signal(signal.SIGKILL)
    _wait(lambda: len(_ended(read_trials(storage))) >= 8, sweep)
    sweep.kill()
    sweep.wait()
    before = {trial.number: trial for trial in _ended(read_trials(storage))}
    subprocess.run(command, check=True)
    trials = read_trials(storage)
    kept = sum(trial == before.get(trial.number) for trial in trials)
    events = [event["event"] for trial in trials for event in read_events(folder / "asha" / trial.run)]
    spent = sum(trial.steps for trial in trials)
    return {
        "seconds": round(time.monotonic() - began),
        "statuses": {
            status: sum(trial.status == status for trial in trials) for status in ("finished", "stopped")
        },
        "steps": spent,
        "share_of_all_steps": round(spent / (len(trials) * steps), 3),
        "default": _objective(trials[0]),
        "best": min(map(_objective, trials)),
        "best_values": min(trials, key=_objective).values,
        "worker_failures": events.count("failure"),
        "ended_before_the_driver_was_killed": len(before),
        "of_these_unchanged": kept,
        "attempts": sum(trial.attempts for trial in trials),
    }


def measure_population(folder: Path, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The best of a population and of a random search that begins alike."""
    found: dict[str, Any] = {"seed": seed}
    for scheduler in ("none", "pbt"):
        name = f"{scheduler}-{seed}"
        command = _command(
            folder,
            name,
            arguments.steps,
            f"sweep.space={SPACE}",
            "sweep.first=[]",
            f"sweep.trials={arguments.population}",
            f"sweep.concurrent={arguments.population}",
            f"sweep.seed={seed}",
            f"train.seed={seed}",
            f"sweep.scheduler={scheduler}",
            f"sweep.perturb_steps={arguments.steps // GENERATIONS}",
        )
        subprocess.run(command, check=True)
        trials = read_trials(open_storage(folder / name))
        best = min(trials, key=_objective)
        found[scheduler] = {
            "best": _objective(best),
            "worst": max(map(_objective, trials)),
            "values": best.values,
            "steps": sum(trial.steps for trial in trials),
            "changed": sum(not trial.run.endswith(f"{trial.number:03d}") for trial in trials),
        }
    return found


def _command(folder: Path, name: str, steps: int, *overrides: str) -> list[str]:
    settings = [f"train.storage={folder}", f"train.name={name}", f"train.steps={steps}"]
    # Trials share the cores.
    settings += ["parallel.cpus_per_worker=0.5", "optim.warmup_steps=6", "train.log_every=3", "train.eval_every=3"]
    settings += ["train.eval_batches=2", "train.global_batch=8", "checkpoint.every=9", "sweep.constraints=[]"]
    return [sys.executable, "jobs/sweep.py", CONFIG, *settings, *overrides]


def _train_workers() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        # One may end while it is looked at.
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(child.cmdline()[:1]):
                found.append(child)
    return found


def _ended(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.status not in ("pending", "running")]


def _steps(trials: list[Trial], number: int) -> int:
    return trials[number].steps if len(trials) > number else 0


def _objective(trial: Trial) -> float:
    return trial.metrics.get("val_loss", float("inf"))


def _wait(condition: Callable[[], bool], sweep: subprocess.Popen[bytes]) -> None:
    while not condition():
        if sweep.poll() is not None:
            raise RuntimeError(f"the sweep ended with {sweep.returncode} before what was waited for.")
        time.sleep(0.2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, default=54, help="of a whole trial, a multiple of 27; default: %(default)s"
    )
    parser.add_argument(
        "--concurrent", type=int, default=2, help="trials of the sweep at once; default: %(default)s"
    )
    parser.add_argument("--population", type=int, default=4, help="default: %(default)s")
    parser.add_argument(
        "--seeds", type=int, default=2, help="of population and random search; default: %(default)s"
    )
    parser.add_argument("--only", choices=("asha", "pbt"), help="default: both")
    parser.add_argument("--folder", help="of the runs; default: a temporary one")
    main(parser.parse_args())
