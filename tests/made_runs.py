"""Runs that nobody trained: their files, written as training writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

START = 1_795_640_000.0


def metrics_line(step: int, layers: int = 2, experts: int = 4, **changes: Any) -> dict[str, Any]:
    """What a run logs at a step, at random but equal for equal arguments."""
    rng = np.random.default_rng(step)
    load_LE = rng.dirichlet([9.0] * experts, layers)
    cv_L = load_LE.std(axis=1) * experts
    return {
        "step": step,
        "tokens": step * 1000,
        "loss": 5 + 3 / step,
        "perplexity": 200.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "skipped_steps": 0,
        "tokens_per_second": 1000.0,
        "step_seconds": 1.0,
        "data_seconds": 0.01,
        "forward_seconds": 0.3,
        "dispatch_seconds": 0.1,
        "backward_seconds": 0.5,
        "load_cv": float(cv_L.max()),
        "routing_entropy": 0.8,
        "dead_experts": 0,
        "dropped_fraction": 0.0,
        "load_cv_by_layer": cv_L.tolist(),
        "routing_entropy_by_layer": rng.random(layers).tolist(),
        "dead_experts_by_layer": [0] * layers,
        "load_by_layer": load_LE.tolist(),
        "world_size": 2,
        "ep": 2,
        "time": START + step,
        "failed_checkpoints": 0,
        "resumed_step": 0,
        "redone_steps": 0,
        "restore_seconds": 1.0,
        **changes,
    }


def evaluated(**domains: float) -> dict[str, Any]:
    """What a step that evaluates logs besides."""
    return {"val_loss": 5.1, "val_perplexity": 164.0, "val_perplexity_by_domain": domains}


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    events: list[dict[str, Any]] = (),
    steps: int = 20,
    log_every: int = 1,
) -> Path:
    """The files of a run that has logged these lines."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = len(lines[0].get("load_by_layer", "12")) if lines else 2
    settings = {
        "model": {"num_layers": layers},
        "optim": {"warmup_steps": 1},
        "train": {"steps": steps, "log_every": log_every},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def restarted(folder: Path) -> Path:
    """A run of 20 steps whose worker died after step 12, when step 8 was saved."""
    lines = [
        metrics_line(step, **(evaluated(code=170.0, verse=90.0) if step % 4 == 0 else {})) for step in range(1, 9)
    ]
    again = {"resumed_step": 8, "redone_steps": 4, "restore_seconds": 2.0}
    lines += [metrics_line(step, **again, time=START + step + 30) for step in range(9, 21)]
    failure = {
        "event": "failure",
        "reason": "its process or node died",
        "ranks": [1],
        "retry": True,
        "saved_step": 8,
    }
    events = [
        {"event": "start", "time": START, "workers": 2},
        {**failure, "time": START + 13},
        {"event": "start", "time": START + 35, "workers": 2},
        {"event": "alert", "time": START + 48, "alert": "Stalled", "severity": "warning", "summary": "no step."},
    ]
    return write_run(folder, lines, events)
