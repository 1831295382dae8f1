"""Sweeps that nobody ran."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_ray.tuning.report.sweep import Sweep
from moe_ray.tuning.trials import Trial

STEPS = 400


def make_trials(count: int, seed: int = 0) -> list[Trial]:
    """Trials whose loss depends on the learning rate above all, then on `top_k`, and not on the router.

    Four in five are stopped early; the first of every seven failed, and every ninth was impossible.
    """
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        lr = float(np.exp(rng.uniform(np.log(1e-4), np.log(1e-1))))
        values: dict[str, Any] = {"optim.lr": lr, "model.top_k": int(rng.choice([1, 2, 4]))}
        values["model.router"] = str(rng.choice(["top_k", "expert_choice"]))
        if values["model.router"] == "top_k":
            values["model.score_func"] = str(rng.choice(["softmax", "sigmoid"]))
        final = 3.5 + 0.15 * math.log(lr / 4e-3) ** 2 - 0.1 * values["model.top_k"] + 0.03 * rng.standard_normal()
        status = "failed" if number % 7 == 3 else "infeasible" if number % 9 == 8 else "finished"
        steps = 0 if status == "infeasible" else 50 if status == "failed" else STEPS
        if status == "finished" and final > 3.8:
            status, steps = "stopped", 100
        history = tuple(
            (step, final + 40 / step + 0.01 * float(rng.standard_normal())) for step in range(50, steps + 1, 50)
        )
        trials.append(
            Trial(
                number,
                f"trial-{number:04d}",
                values,
                status,
                {"failed": "a loss that is not finite", "infeasible": "model.top_k=9", "stopped": "rung 100"}.get(
                    status
                ),
                steps,
                {"val_loss": history[-1][1], "load_cv": 0.1} if history else {},
                history,
                None if status == "infeasible" else 1e7 * (1 + values["model.top_k"]),
                8_000_000,
                3_000_000 + 400_000 * values["model.top_k"],
                60.0,
                1,
                number,
            )
        )
    return trials


def make_sweep(trials: Sequence[Trial], name: str = "night") -> Sweep:
    """With the finished trial of the lowest loss as its best."""
    done = [trial for trial in trials if trial.status == "finished"]
    best = min(done, key=lambda trial: trial.metrics["val_loss"], default=None)
    return Sweep(name, trials, "val_loss", True, STEPS, best)
