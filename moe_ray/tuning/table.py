"""The trials of a sweep as a table: on a terminal one that is redrawn, elsewhere a line for each that ends."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table as Grid

from moe_ray.telemetry.records import one_line
from moe_ray.tuning.board import Board
from moe_ray.tuning.objective import ranked
from moe_ray.tuning.trials import Trial

_SECONDS = 0.5
_MOST_ROWS = 30
_REASON = 60


class Table:
    """Follows a board while the block runs, and prints the whole table after it."""

    def __init__(self, board: Board, console: Console | None = None) -> None:
        self._board = board
        # A log has no width; lines of a narrow one are hard to read.
        self._console = console or Console(width=None if sys.stdout.isatty() else 160)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._said = {number: trial.status for number, trial in board.trials.items()}
        self._drawn_at = float("-inf")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        self._print_changes()
        self._console.print(table(self._board, len(self._board.trials)))

    def update(self) -> None:
        """Show what has changed."""
        if time.monotonic() - self._drawn_at < _SECONDS:
            return
        self._drawn_at = time.monotonic()
        if self._console.is_terminal:
            self._live.update(table(self._board, _MOST_ROWS), refresh=True)
        self._print_changes()

    def _print_changes(self) -> None:
        """The lines of a log."""
        if self._console.is_terminal:
            return
        for number, trial in sorted(self._board.trials.items()):
            if self._said.get(number) != trial.status:
                self._said[number] = trial.status
                print(_line(self._board, trial), flush=True)


def table(board: Board, most: int) -> Grid:
    """The trials, the best first."""
    sweep = board.config.sweep
    order = ranked(sweep, board.trials.values())
    others = [trial for _, trial in sorted(board.trials.items()) if trial not in order]
    shown = (order + others)[:most]
    grid = Grid(title=_title(board), title_justify="left")
    for name in ("trial", "status", "steps", "s", sweep.metric, *(bound.metric for bound in sweep.bounds)):
        grid.add_column(name, justify="left" if name == "status" else "right")
    for name in sweep.space:
        grid.add_column(name, justify="right")
    for trial in shown:
        metrics = [trial.metrics.get(name) for name in (sweep.metric, *(bound.metric for bound in sweep.bounds))]
        is_told = trial.reason is not None and trial.status != "stopped"
        status = trial.status + (f": {one_line(trial.reason)[:_REASON]}" if is_told else "")
        cells = (str(trial.number), status, str(trial.steps), f"{trial.seconds:.0f}", *map(_number, metrics))
        grid.add_row(*cells, *(_value(trial.values.get(name)) for name in sweep.space))
    return grid


def _title(board: Board) -> str:
    trials = board.trials.values()
    counts = {
        status: sum(trial.status == status for trial in trials) for status in {trial.status for trial in trials}
    }
    said = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    most, steps = board.config.sweep.trials, sum(trial.steps for trial in trials)
    return f"{board.config.train.name}: {said or 'none'} of at most {most} trials; {steps:,} steps"


def _line(board: Board, trial: Trial) -> str:
    values = ", ".join(f"{name}={_value(value)}" for name, value in trial.values.items())
    metric = board.config.sweep.metric
    found = f", {metric} {_number(trial.metrics[metric])}" if metric in trial.metrics else ""
    why = f" ({one_line(trial.reason)})" if trial.reason else ""
    return f"trial {trial.number} {trial.status} at step {trial.steps}{found}: {values}{why}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)
