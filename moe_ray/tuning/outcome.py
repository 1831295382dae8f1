"""What a sweep leaves: `best.yaml`, `sweep.html`, and with AutoML `auto.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import yaml

from moe_ray.errors import TrainingError
from moe_ray.tuning.auto.recommend import fit_ladder, recommend
from moe_ray.tuning.auto.shapes import DERIVED
from moe_ray.tuning.board import Board
from moe_ray.tuning.changes import read_changes
from moe_ray.tuning.objective import ranked, violation
from moe_ray.tuning.report.auto import auto_findings, auto_section
from moe_ray.tuning.report.build import write_sweep_page
from moe_ray.tuning.report.sweep import Sweep
from moe_ray.tuning.space import resolve, with_configured
from moe_ray.tuning.trials import Trial

BEST, AUTO = "best.yaml", "auto.json"


def best_trial(board: Board) -> Trial | None:
    """The best of a sweep, so far."""
    return next(iter(ranked(board.config.sweep, board.trials.values())), None)


def write_outcome(board: Board) -> None:
    """Write what the trials tell so far.

    Raises:
        StorageError: it cannot be written.
        TrainingError: all runs of AutoML's ladder have ended, and too few of them well.
    """
    if board.config.sweep.auto:
        _write_recommendation(board)
        return
    best = best_trial(board)
    if best is not None:
        _write_settings(board, best.values)
    write_sweep_page(board.storage, _sweep(board, best))


def _write_recommendation(board: Board) -> None:
    config, sweep = board.config, _sweep(board, None)
    if len(board.with_status("finished", "failed", "infeasible")) < config.sweep.trials:
        write_sweep_page(board.storage, sweep)
        return
    try:
        ladder = fit_ladder(config, sweep.trials)
    except TrainingError:
        write_sweep_page(board.storage, sweep)
        raise
    found = recommend(config, ladder)
    board.storage.write(AUTO, json.dumps(asdict(found), indent=1).encode())
    _write_settings(board, found.values)
    write_sweep_page(board.storage, sweep, [auto_section(config, ladder, found)], auto_findings(found))


def _sweep(board: Board, best: Trial | None) -> Sweep:
    config = board.config
    if best is not None and violation(config.sweep.bounds, best.metrics) is not None:
        best = None
    trials = [board.trials[number] for number in sorted(board.trials)]
    is_min, train = config.sweep.mode == "min", config.train
    varied = {"train.global_batch", "train.eval_batches", "data.sequence_length"}
    evaluated = train.eval_batches * train.global_batch * config.data.sequence_length
    return Sweep(
        config.train.name,
        trials,
        config.sweep.metric,
        is_min,
        config.train.steps,
        best,
        hidden=DERIVED if config.sweep.auto else frozenset(),
        configured=None if config.sweep.auto else with_configured(config, {}),
        bounds=config.sweep.bounds,
        most=config.sweep.trials,
        held_out_tokens=0 if varied & config.sweep.space.keys() else evaluated,
        changes=tuple(read_changes(board.storage, board.trials)) if config.sweep.scheduler == "pbt" else (),
    )


def _write_settings(board: Board, values: Mapping[str, Any]) -> None:
    config = resolve(board.config, values)
    train = config.train.model_copy(update={"name": f"{config.train.name}-best"})
    tree = config.model_copy(update={"train": train}).model_dump(mode="json", exclude={"sweep"})
    board.storage.write(BEST, yaml.safe_dump(tree, sort_keys=False).encode())
