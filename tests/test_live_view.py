"""The live view of a run: what it reads, what it shows, and how it ends, in a terminal of the test."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from jobs.report import main as report
from jobs.watch import main
from moe_ray.analytics.live.braille import bars, curve
from moe_ray.analytics.live.tail import RunTail, Snapshot
from moe_ray.analytics.live.view import Frame
from moe_ray.errors import ConfigError
from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import SWEEP_SETTINGS, drop_metrics_after
from tests.made_runs import START, metrics_line, restarted, write_run

ROOT = Path(__file__).resolve().parents[1]


def text_of(snapshot: Snapshot, width: int = 100, height: int = 40) -> str:
    output = StringIO()
    console = Console(file=output, width=width, height=height, color_system=None)
    console.print(Frame(snapshot))
    return output.getvalue()


def append(run: Path, *lines: dict) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def save(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")


def test_tail_reads_what_is_new_and_starts_again_after_a_restart(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics_line(step) for step in (1, 2)])
    tail = RunTail(open_storage(run), "run")

    def steps() -> list[int]:
        return [record["step"] for record in tail.look(START).records]

    assert steps() == [1, 2]
    with (run / "metrics.jsonl").open("a") as file:
        line = json.dumps(metrics_line(3))
        file.write(line[:50])
        file.flush()
        assert steps() == [1, 2]
        file.write(line[50:] + "\n")
    assert steps() == [1, 2, 3]
    assert tail.look(START).newest == metrics_line(3)
    drop_metrics_after(open_storage(run), 1)
    append(run, metrics_line(2, loss=4.0))
    assert steps() == [1, 2]
    assert tail.look(START).records[-1]["loss"] == 4.0


def test_frame_tells_how_a_run_does(tmp_path: Path) -> None:
    run = restarted(tmp_path / "night")
    save(run, 12)
    frame = text_of(RunTail(open_storage(run), "night").look(START + 51))
    for part in (
        "night  2 workers, ep=2  training  started 2 times",
        "step 20/20  100%  ETA 0:00:00",
        "◆ held-out 5.100 at step 8",
        "1,000 tokens/s",
        "█ backward 55%",
        "checkpoint of step 12, 0:00:09 ago, 8 steps behind",
        "failure  reason its process or node died",
    ):
        assert part in frame
    assert "silent for" in text_of(RunTail(open_storage(run), "night").look(START + 5000))
    save(run, 20)
    assert "finished" in text_of(RunTail(open_storage(run), "night").look(START + 5000))


def test_time_that_is_left_is_not_told_before_a_step_is_logged(tmp_path: Path) -> None:
    run = write_run(tmp_path, [])
    frame = text_of(RunTail(open_storage(run), "night").look(START))
    assert "step 0/20  0%" in frame
    assert "ETA" not in frame


def test_alerts_that_still_fire_stay_in_sight(tmp_path: Path) -> None:
    alert = {"event": "alert", "severity": "critical", "summary": "it is bad", "labels": {}}
    events = [
        {**alert, "time": START, "alert": "Firing"},
        {**alert, "time": START + 1, "alert": "Over"},
        {**alert, "time": START + 2, "alert": "Over", "event": "resolved"},
        *({"event": "start", "time": START + number, "workers": number} for number in range(3, 8)),
    ]
    frame = text_of(RunTail(open_storage(write_run(tmp_path, [metrics_line(1)], events)), "night").look(START))
    assert "Firing, it is bad" in frame
    assert "Over" not in frame
    assert [f"workers {number}" in frame for number in range(3, 8)] == [False, False, True, True, True]


@pytest.mark.parametrize(("width", "height"), [(40, 15), (80, 24), (200, 60)])
def test_frame_fits_the_terminal(width: int, height: int, tmp_path: Path) -> None:
    lines = [metrics_line(step, layers=30, experts=64) for step in range(1, 40)]
    run = write_run(tmp_path, lines, [{"event": "failure", "time": START, "reason": "a\nb" * 99}])
    output = StringIO()
    console = Console(file=output, width=width, height=height, color_system=None)
    frame = Frame(RunTail(open_storage(run), "x" * 99).look(START))
    rows = console.render_lines(frame, console.options.update(height=height), pad=False)
    while rows and not "".join(segment.text for segment in rows[-1]).strip():
        rows.pop()
    assert height - 2 <= len(rows) <= height
    assert all(sum(segment.cell_length for segment in row) <= width for row in rows)
    assert "least even of 30 layers" in "".join(segment.text for row in rows for segment in row) or width < 80


def test_curve_goes_from_corner_to_corner() -> None:
    assert curve([(0.0, 1.0), (1.0, 0.0)], 0.0, 1.0, width=2, height=1) == ["⠑⢄"]
    assert curve([], 0.0, 1.0, width=2, height=1) == ["⠀⠀"]
    assert bars([0, 1, 2, 9], 2.0) == "▁▅██"


def test_one_frame_where_there_is_no_terminal(storage_uri: str, tmp_path: Path, capsys) -> None:
    storage = open_storage(storage_uri)
    for file in restarted(tmp_path / "made").iterdir():
        storage.write(file.name, file.read_bytes())
    main([storage_uri, "--once"])
    assert "step 20/20" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [(["/nowhere/run"], "holds no run"), ([], "0 runs are given"), (["a", "--twice"], "'--twice' is no option")],
)
def test_mistakes_are_told(arguments: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        main(arguments)


@pytest.mark.parametrize("command", [main, report])
def test_a_sweep_is_no_run(command: Callable[[list[str]], None], tmp_path: Path) -> None:
    (tmp_path / SWEEP_SETTINGS).write_text("{}")
    with pytest.raises(ConfigError, match=r"is a sweep, no run\. Fix: .*trial-NNN"):
        command([str(tmp_path)])


class Terminal:
    """`jobs/watch.py` in a terminal, and what it has written."""

    def __init__(self, run: Path) -> None:
        self._master, slave = pty.openpty()
        self.resize(30, 90)
        command = [sys.executable, "jobs/watch.py", str(run)]
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        environment = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.output = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def await_text(self, text: str) -> None:
        """Read until it has written this since the last call."""
        seen, deadline = "", time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, f"{text!r} is not in {seen[-2000:]!r}"
            ready, _, _ = select.select([self._master], [], [], 1.0)
            if ready:
                seen += os.read(self._master, 1 << 16).decode(errors="replace")
        self.output += seen

    def finish(self) -> int:
        """Exit code, once all that it writes is read."""
        while True:
            try:
                self.output += os.read(self._master, 1 << 16).decode(errors="replace")
            except OSError:  # the other side is closed
                return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextmanager
def watching(run: Path) -> Iterator[Terminal]:
    terminal = Terminal(run)
    try:
        yield terminal
    finally:
        terminal.close()


def test_follows_a_run_to_its_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics_line(step) for step in (1, 2)])
    with watching(run) as terminal:
        terminal.await_text("step 2/20")
        append(run, metrics_line(3))
        terminal.await_text("step 3/20")
        terminal.resize(20, 50)
        append(run, metrics_line(4))
        terminal.await_text("step 4/20")
        append(run, *(metrics_line(step) for step in range(5, 21)))
        save(run, 20)
        assert terminal.finish() == 0
    # The alternate screen is left, and the last frame stays on the normal one.
    last = terminal.output.rpartition("\x1b[?1049l")[2]
    assert "finished" in last
    assert max(len(line) for line in last.splitlines() if "─" in line) < 90


def test_ctrl_c_is_a_good_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics_line(step) for step in (1, 2)])
    with watching(run) as terminal:
        terminal.await_text("step 2/20")
        os.killpg(terminal.process.pid, signal.SIGINT)
        assert terminal.finish() == 0
    assert "Traceback" not in terminal.output
