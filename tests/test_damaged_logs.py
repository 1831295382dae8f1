"""Whoever reads the logs of a run reads on where lines are damaged, of another version or hostile."""

import math
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from jobs.monitor import build_watcher
from moe_ray.analytics.live.tail import RunTail
from moe_ray.analytics.live.view import Frame
from moe_ray.analytics.report.build import run_page
from moe_ray.analytics.report.page import render
from moe_ray.analytics.report.run import read_run
from moe_ray.storage import open_storage
from moe_ray.telemetry.run_log import read_metrics
from tests.made_runs import START, metrics_line, write_run

VALUES = [None, math.nan, math.inf, -1, 1e308, 10**400, "x", [], {}, [1], True]
FIELDS = [
    "step",
    "time",
    "loss",
    "step_seconds",
    "world_size",
    "load_by_layer",
    "load_cv_by_layer",
    "dead_experts_by_layer",
    "val_perplexity_by_domain",
]
DEEP = '{"step": 4, "event": "x", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"


def frame(run: Path) -> str:
    output = StringIO()
    Console(file=output, width=120, height=40, color_system=None).print(
        Frame(RunTail(open_storage(run), run.name).look(START + 9))
    )
    return output.getvalue()


def read_by_all(run: Path) -> str:
    """The live view of a run that its report and the monitor can read too."""
    render(run_page(read_run(str(run))))
    watcher = build_watcher([str(run)], [], [])
    now = time.time()
    watcher.round(now)
    failing = {dict(labels)["source"] for labels, value in watcher.store.at("moe_monitor_errors", now) if value}
    assert "run run" not in failing
    return frame(run)


@pytest.mark.parametrize("field", FIELDS)
def test_lines_with_a_wrong_or_missing_field_are_read_over(tmp_path: Path, field: str) -> None:
    lines = [metrics_line(step) for step in (1, 2, 3)]
    for number, value in enumerate(VALUES):
        run = write_run(tmp_path / str(number), [*lines[:2], {**lines[2], field: value}])
        assert "step " in read_by_all(run)
    without: list[dict[str, Any]] = [{k: v for k, v in line.items() if k != field} for line in lines]
    read_by_all(write_run(tmp_path / "without", without))


def test_layers_and_experts_that_change_or_do_not_fit_leave_the_rest_readable(tmp_path: Path) -> None:
    first = metrics_line(1)
    for number, changed in enumerate(
        (
            metrics_line(2, layers=3),
            metrics_line(2, experts=8),
            metrics_line(2, load_by_layer=[[0.5, 0.5], [1.0]]),
            metrics_line(2, load_by_layer=[[0.5, 0.5, None, 0.0], [1.0, 0.0, 0.0, 0.0]]),
            metrics_line(2, load_by_layer=[[0.5, 0.5, 0.0, 0.0]]),
            metrics_line(2, load_cv_by_layer=[None, 1.0]),
        )
    ):
        assert "step " in read_by_all(write_run(tmp_path / str(number), [first, changed]))


def test_steps_out_of_order_and_values_nested_too_deeply_are_no_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics_line(step) for step in (3, 1, 2)])
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run / name).open("a") as file:
            file.write(DEEP + "\n")
    read_by_all(run)
    assert [record["step"] for record in read_metrics(run)] == [3, 1, 2]


@pytest.mark.parametrize("field", ["time", "event", "reason", "ranks", "summary"])
def test_events_with_odd_values_are_told(tmp_path: Path, field: str) -> None:
    event = {"event": "failure", "time": START + 1, "reason": "its node died"}
    for number, value in enumerate([*VALUES, 1e20]):
        run = write_run(tmp_path / str(number), [metrics_line(1)], [event, {**event, field: value}])
        assert "its node died" in read_by_all(run)


def test_no_text_of_a_run_moves_the_cursor_of_who_watches_it(tmp_path: Path) -> None:
    text = "\x1b]0;title\x07 \x9b2J \x1b[2J\r\nnew line"
    event = {"event": text, "time": START, "reason": text}
    lines = [{**metrics_line(1), "world_size": text}]
    shown = frame(write_run(tmp_path / f"run{text.replace('/', '')}", lines, [event]))
    assert "new line" in shown
    assert all(letter.isprintable() or letter == "\n" for letter in shown)


def test_what_has_been_read_is_kept_while_the_other_log_cannot_be(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics_line(1, skipped_steps=1), metrics_line(2, skipped_steps=2)])
    events = run / "events.jsonl"
    events.unlink()
    events.mkdir()
    watcher = build_watcher([str(run)], [], [])
    watcher.round(START + 3)
    events.rmdir()
    watcher.round(START + 4)
    assert [value for _, value in watcher.store.at("moe_train_skipped_steps", START + 4)] == [3]


def test_settings_that_cannot_be_read_are_an_answer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [metrics_line(1)])
    for settings in (f"a: {'[' * 3000}{']' * 3000}", f"train: {{steps: {'9' * 400}}}"):
        (run / "config.yaml").write_text(settings)
        assert "step 1" in frame(run)
