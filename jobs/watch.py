"""Follow a run in the terminal: progress, loss, load of the experts, speed, checkpoints, events.

usage: python jobs/watch.py RUN [--once]

RUN is the folder of a run or its s3:// or gs:// URI; it may train anywhere. Ends with the run's last step, or with
Ctrl-C. With `--once`, and where the output is no terminal, one frame is printed.
"""

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live

from jobs.cli import exit_on_error
from moe_ray.analytics.live.tail import RunTail, Snapshot
from moe_ray.analytics.live.view import Frame
from moe_ray.analytics.report.run import open_run
from moe_ray.errors import ConfigError, StorageError

_ONCE = "--once"
_SECONDS = 1.0
# A whole file is read each time; a run writes it every five seconds at most.
_OBJECT_STORE_SECONDS = 5.0


def main(arguments: Sequence[str]) -> None:
    """Draw frames until the run ends or the user does."""
    runs = [argument for argument in arguments if not argument.startswith("-")]
    unknown = [argument for argument in arguments if argument.startswith("-") and argument != _ONCE]
    if unknown:
        raise ConfigError(f"{unknown[0]!r} is no option of watch.", f"there is only {_ONCE}.")
    if len(runs) != 1:
        raise ConfigError(f"{len(runs)} runs are given.", "give one: its folder, or its s3:// or gs:// URI.")
    run, name = open_run(runs[0])
    tail, console = RunTail(run, name), Console()
    if _ONCE in arguments or not console.is_terminal:
        console.print(Frame(tail.look(time.time())))
        return
    seconds = _SECONDS if run.local is not None else _OBJECT_STORE_SECONDS
    snapshot = tail.look(time.time())
    try:
        snapshot = _follow(tail, snapshot, console, seconds)
    except KeyboardInterrupt:
        snapshot = _look(tail, snapshot)
    # The screen that was drawn on is gone.
    console.print(Frame(snapshot))


def _follow(tail: RunTail, snapshot: Snapshot, console: Console, seconds: float) -> Snapshot:
    """Draw until the run is finished; the console redraws by itself when its size changes."""
    with Live(Frame(snapshot), console=console, screen=True, refresh_per_second=4) as live:
        while not snapshot.is_finished:
            time.sleep(seconds)
            snapshot = _look(tail, snapshot)
            live.update(Frame(snapshot))
    return snapshot


def _look(tail: RunTail, before: Snapshot) -> Snapshot:
    """The run as it is now; as it was, while its storage does not answer."""
    try:
        return tail.look(time.time())
    except StorageError:
        return before


if __name__ == "__main__":
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    exit_on_error(lambda: main(sys.argv[1:]))
