"""Population-based training (Jaderberg et al. 2017) in generations.

All trials train `sweep.perturb_steps` steps and save. Then the worst go on from checkpoints of the best, with the
best's settings, some of them changed. What changes is written down before it is done, so that a sweep that was
killed does the same.
"""

import json
import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from ray.tune.schedulers import FIFOScheduler

from moe_ray.checkpoint.fork import fork
from moe_ray.config import Config
from moe_ray.storage import Storage
from moe_ray.sweep_config import Dimension
from moe_ray.telemetry.run_log import EVENTS
from moe_ray.training.trainer import StopSwitch
from moe_ray.tuning.board import Board
from moe_ray.tuning.changes import Change, read_changes, write_changes
from moe_ray.tuning.objective import ranked
from moe_ray.tuning.search import Search
from moe_ray.tuning.space import Values, draw_value, mutable_settings
from moe_ray.tuning.trials import Trial
from moe_ray.tuning.tuner import Work, run_trials

_FACTORS = (0.8, 1.25)


def run_population(board: Board, work: Work, switch: StopSwitch) -> None:
    """Run all generations, or those that are left, until the switch is pressed."""
    config = board.config
    search = Search(config, list(board.trials.values()))
    while (trial := search.propose()) is not None:
        board.put(trial)
    changes = read_changes(board.storage, board.trials)
    start = max((change.step for change in changes), default=0)
    _apply(board, work, [change for change in changes if change.step == start])
    while not switch.is_pressed:
        until = min(start + config.sweep.perturb_steps, config.train.steps)
        _train(board, work, start, until, switch)
        if switch.is_pressed or until == config.train.steps:
            return
        planned = plan(config, _alive(board), until)
        changes += planned
        write_changes(board.storage, changes)
        _apply(board, work, planned)
        start = until


def plan(config: Config, trials: Iterable[Trial], step: int) -> list[Change]:
    """Which trials go on from which others' checkpoints of a step, and with which values; the same each time."""
    generator = random.Random(f"{config.sweep.seed}/generation/{step}")  # nosec B311
    order = ranked(config.sweep, trials)
    count = min(max(1, int(config.sweep.replaced_fraction * len(order))), len(order) // 2)
    best, worst = order[:count], order[len(order) - count :]
    changes = []
    for trial in worst:
        source = generator.choice(best)
        run = f"trial-{trial.number:03d}-from-{step}"
        values = perturb(config, source.values, generator)
        changes.append(Change(step, trial.number, source.number, run, dict(trial.values), values))
    return changes


def perturb(config: Config, values: Mapping[str, Any], generator: random.Random) -> Values:
    """Values near these, within the space, or here and there drawn anew; what cannot change in mid-run stays."""
    changed = dict(values)
    for name in mutable_settings(config):
        if name not in values:
            continue
        dimension = config.sweep.space[name]
        if generator.random() < config.sweep.resample_probability:
            changed[name] = draw_value(dimension, generator)
        else:
            changed[name] = _near(dimension, values[name], generator)
    return changed


def _near(dimension: Dimension, value: Any, generator: random.Random) -> Any:
    if dimension.bounds is not None:
        # The configured value of a first trial may be null.
        if not isinstance(value, int | float):
            return draw_value(dimension, generator)
        low, high = dimension.bounds
        return min(high, max(low, value * generator.choice(_FACTORS)))
    values = dimension.values or ()
    if value not in values:
        return generator.choice(values)
    place = values.index(value) + generator.choice((-1, 1))
    return values[min(max(place, 0), len(values) - 1)]


def _alive(board: Board) -> list[Trial]:
    return board.with_status("pending", "finished")


def _train(board: Board, work: Work, start: int, until: int, switch: StopSwitch) -> None:
    """Bring all trials to a step."""
    waiting = [trial for trial in _alive(board) if trial.steps < until]
    steps = board.config.train.steps

    def settings(trial: Trial) -> Config:
        config = work.settings(trial)
        train = config.train.model_copy(update={"until": until if until < steps else None})
        return config.model_copy(update={"train": train})

    generation = replace(
        work,
        take=lambda: waiting.pop(0) if waiting else None,
        settings=settings,
        after=start,
        until=until,
    )
    if waiting:
        run_trials(board, generation, FIFOScheduler(), switch)
    if until < steps:
        board.put(*(replace(trial, status="pending") for trial in _alive(board)))


def _apply(board: Board, work: Work, changes: Iterable[Change]) -> None:
    """Make the changes that were not made, all at once as far as the board says."""
    changed = []
    for change in changes:
        trial, source = board.trials[change.number], board.trials[change.source]
        if trial.run == change.run:
            continue
        after = replace(trial, run=change.run, values=change.values)
        board.storage.delete(change.run)
        target = board.storage.child(change.run)
        fork(board.storage.child(source.run), change.step, target, work.settings(after))
        event = {"event": "exploit", "time": time.time(), **asdict(change)}
        target.write(EVENTS, _events(board.storage.child(trial.run)) + json.dumps(event).encode() + b"\n")
        changed.append(after)
    board.put(*changed)


def _events(run: Storage) -> bytes:
    try:
        return run.read(EVENTS)
    except FileNotFoundError:
        return b""
