"""A frame of the live view: a run as text, as wide and high as the terminal."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from moe_ray.analytics.live.braille import bars, curve
from moe_ray.analytics.live.tail import Snapshot
from moe_ray.telemetry.records import is_number, one_line, time_of

# From few to many tokens, along cividis; the height of a bar says the same.
_HEAT = ("#003f8f", "#4d5a7a", "#7c7b78", "#a99c6a", "#d6be4f", "#fdea45")
_FILLS = ("█", "▓", "▒", "░", "▚", "▞", "#", "=", "+")
_STYLES = ("blue", "dark_orange", "green", "magenta", "yellow", "cyan")
_LATE_SECONDS = 60.0
_MOST_EVENTS = 4
_WIDEST_BAR = 6
_AGES = 1e10
_NO_PHASES = ("step", "restore", "checkpoint_stall", "checkpoint_write")


@dataclass(frozen=True)
class Frame:
    """Renders a snapshot into whatever room the console has."""

    snapshot: Snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        height = options.height or max(28, min(console.height, 40))
        newest = self.snapshot.newest
        top = [_head(self.snapshot, width), _progress(self.snapshot, width)]
        events = _events(self.snapshot)
        if newest is None:
            yield Group(*top, Text("no step is logged yet", style="dim"), *events)
            return
        split = _split(newest, width)
        # What is left after the lines above, between and below, and the borders.
        room = max(4, height - 9 - len(split) - len(events))
        curve_rows = max(3, room // 2)
        yield Group(
            *top,
            _panel("loss", _curves(self.snapshot.records, width - 4, curve_rows)),
            _panel("load of the experts", _experts(newest, width - 4, room - curve_rows)),
            _speed(self.snapshot.records, width),
            *split,
            _checkpoint(self.snapshot),
            *events,
        )


def _panel(title: str, content: Table) -> Panel:
    """As high as its content; a panel of no given height takes the whole screen."""
    return Panel(content, title=title, title_align="left", height=content.row_count + 2)


def _head(snapshot: Snapshot, width: int) -> Text:
    newest = snapshot.newest
    text = Text(no_wrap=True, overflow="ellipsis")
    name = Text(one_line(snapshot.name), style="bold")
    name.truncate(max(8, width - 40), overflow="ellipsis")
    text.append_text(name)
    if newest is None:
        return text.append(_restarts(snapshot))
    world, ep = newest.get("world_size"), newest.get("ep")
    if is_number(world) and is_number(ep):
        text.append(f"  {world} worker{'' if world == 1 else 's'}, ep={ep}")
    silent = snapshot.time - newest.get("time", snapshot.time)
    expected = 3 * _recent_seconds(snapshot.records) * _log_every(snapshot.records)
    if snapshot.is_finished:
        text.append("  finished", style="green")
    elif silent > max(_LATE_SECONDS, expected):
        text.append(f"  silent for {_ago(silent)}", style="bold red")
    else:
        text.append("  training", style="green")
    return text.append(_restarts(snapshot))


def _restarts(snapshot: Snapshot) -> str:
    """How often workers started again, whether or not they logged a step."""
    starts = sum(event["event"] == "start" for event in snapshot.events)
    return f"  started {starts} times" if starts > 1 else ""


def _progress(snapshot: Snapshot, width: int) -> Table:
    step = snapshot.newest["step"] if snapshot.newest is not None else 0
    target = snapshot.target or step or 1
    left = max(0, target - step) * _recent_seconds(snapshot.records)
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    bar = ProgressBar(total=target, completed=min(step, target))
    label = f"step {step:,}"
    if snapshot.target is not None:
        label += f"/{target:,}  {step / target:.0%}"
        # Before the first logged step nothing says how long one takes.
        label += f"  ETA {_ago(left)}" if snapshot.newest is not None else ""
    grid.add_row(bar, label)
    return grid


def _curves(records: Sequence[Mapping[str, Any]], width: int, rows: int) -> Table:
    """Training loss as a line of dots; held-out loss beside it where it was measured."""
    training = _points(records, "loss")
    held_out = _points(records, "val_loss")
    values = [value for _, value in training + held_out]
    grid = Table.grid(padding=(0, 1))
    if not values:
        grid.add_row("no finite loss yet")
        return grid
    low, high = min(values), max(values)
    steps = [record["step"] for record in records]
    first, last = min(steps), max(steps)
    plot = max(10, width - 9)
    lines = [
        Text(line, style="bright_blue") for line in curve(_scaled(training, first, last), low, high, plot, rows)
    ]
    for step, value in held_out:
        column = min(plot - 1, int((step - first) / max(1, last - first) * plot))
        row = min(rows - 1, max(0, round((high - value) / max(high - low, 1e-9) * (rows - 1))))
        lines[row].plain = lines[row].plain[:column] + "◆" + lines[row].plain[column + 1 :]
        lines[row].stylize("bold dark_orange", column, column + 1)
    for row, line in enumerate(lines):
        label = f"{high:.3f}" if row == 0 else f"{low:.3f}" if row == rows - 1 else ""
        grid.add_row(Text(f"{label:>7}"), line)
    now = f"training {training[-1][1]:.3f}" if training else ""
    if held_out:
        now += f"   ◆ held-out {held_out[-1][1]:.3f} at step {held_out[-1][0]:,.0f}"
    grid.add_row("", Text(f"steps {first:,} to {last:,}   {now}", no_wrap=True, overflow="ellipsis"))
    return grid


def _experts(newest: Mapping[str, Any], width: int, rows: int) -> Table:
    """A bar for each expert, a row for each layer; those of the largest imbalance where there are too many."""
    grid = Table.grid(padding=(0, 1))
    loads, cvs = newest.get("load_by_layer") or [], newest.get("load_cv_by_layer") or []
    if not loads or not cvs or not all(map(is_number, cvs)):
        grid.add_row("not logged")
        return grid
    dead_by_layer = newest.get("dead_experts_by_layer") or [0] * len(loads)
    most, room = max(1, rows - 1), max(4, width - 22)
    order = sorted(range(len(loads)), key=lambda layer: -cvs[layer])[:most]
    for layer in sorted(order):
        load = _grouped([share * len(loads[layer]) for share in loads[layer]], room)
        bar, times = Text(), max(1, min(_WIDEST_BAR, room // len(load)))
        for value in load:
            bar.append(bars([value], 2.0) * times, style=_HEAT[min(len(_HEAT) - 1, int(value / 2 * len(_HEAT)))])
        dead = dead_by_layer[layer]
        grid.add_row(f"{layer:>3}", bar, f"cv {cvs[layer]:.2f}" + (f" dead {dead}" if dead else ""))
    note = "full height: twice the fair share"
    if len(order) < len(loads):
        note = f"the {len(order)} least even of {len(loads)} layers; {note}"
    if len(loads[0]) > room:
        note += "; each bar is the busiest of neighbouring experts"
    grid.add_row("", Text(note, style="dim", no_wrap=True, overflow="ellipsis"), "")
    return grid


def _speed(records: Sequence[Mapping[str, Any]], width: int) -> Text:
    speeds = [record["tokens_per_second"] for record in records if is_number(record.get("tokens_per_second"))]
    recent = speeds[-max(8, width - 30) :]
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"{recent[-1]:,.0f} tokens/s  " if recent else "")
    text.append(bars(recent, max(recent, default=1.0)), style="bright_blue")
    return text


def _split(newest: Mapping[str, Any], width: int) -> list[Text]:
    """The phases of the last logged step: one bar, and what its fills mean."""
    seconds = {
        name.removesuffix("_seconds"): value
        for name, value in newest.items()
        if name.endswith("_seconds") and name.removesuffix("_seconds") not in _NO_PHASES and is_number(value)
    }
    total = sum(seconds.values())
    if not total:
        return []
    bar, legend = Text(no_wrap=True), Text(no_wrap=True, overflow="ellipsis")
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    for number, (name, value) in enumerate(ordered):
        fill, style = _FILLS[number % len(_FILLS)], _STYLES[number % len(_STYLES)]
        bar.append(fill * round(value / total * (width - 1)), style=style)
        legend.append(fill, style=style)
        legend.append(f" {name} {value / total:.0%}  ")
    return [bar, legend]


def _checkpoint(snapshot: Snapshot) -> Text:
    newest, step = snapshot.newest, snapshot.checkpoint
    assert newest is not None
    if step is None:
        return Text("no checkpoint yet")
    times = [record["time"] for record in snapshot.records if record["step"] >= step and "time" in record]
    age = f", {_ago(snapshot.time - times[0])} ago" if times else ""
    text = Text(f"checkpoint of step {step:,}{age}, {max(0, newest['step'] - step):,} steps behind")
    failed = newest.get("failed_checkpoints")
    if failed:
        text.append(f"; {failed} could not be written since", style="bold red")
    return text


def _events(snapshot: Snapshot) -> list[Text]:
    lines = []
    for event in _shown(snapshot.events):
        when = datetime.fromtimestamp(time_of(event) or 0, UTC)
        told = [event.get("alert"), event["summary"]] if "summary" in event else None
        rest = [f"{name} {value}" for name, value in event.items() if name not in ("event", "time")]
        text = f"{when:%H:%M:%S} {event['event']}  {', '.join(map(str, told or rest))}"
        if told and event["event"] == "resolved":
            text = f"{when:%H:%M:%S} {event['summary']}"
        style = "red" if event["event"] in ("failure", "alert") else ""
        lines.append(Text(one_line(text), style=style, no_wrap=True, overflow="ellipsis"))
    return lines


def _shown(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest events, in their order; alerts that still fire go before others."""
    firing: dict[tuple[str, str], int] = {}
    for number, event in enumerate(events):
        key = (str(event.get("alert")), str(event.get("labels")))
        if event["event"] == "alert":
            firing[key] = number
        elif event["event"] == "resolved":
            firing.pop(key, None)
    kept = sorted(firing.values())[-_MOST_EVENTS:]
    others = [number for number in range(len(events)) if number not in kept]
    room = max(0, _MOST_EVENTS - len(kept))
    return [events[number] for number in sorted([*kept, *others[len(others) - room :]])]


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(record["step"], record[name]) for record in records if is_number(record.get(name))]


def _scaled(points: Sequence[tuple[float, float]], first: int, last: int) -> list[tuple[float, float]]:
    return [((step - first) / max(1, last - first), value) for step, value in points]


def _grouped(values: Sequence[float], most: int) -> list[float]:
    """At most so many values: the largest of neighbours."""
    size = math.ceil(len(values) / most)
    return [max(values[start : start + size]) for start in range(0, len(values), size)]


def _recent_seconds(records: Sequence[Mapping[str, Any]]) -> float:
    seconds = [record["step_seconds"] for record in records[-10:] if is_number(record.get("step_seconds"))]
    return statistics.median(seconds) if seconds else 0.0


def _log_every(records: Sequence[Mapping[str, Any]]) -> int:
    return records[-1]["step"] - records[-2]["step"] if len(records) > 1 else 1


def _ago(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds)))) if seconds < _AGES else "ages"
