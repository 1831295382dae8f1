"""A live progress line that follows a run's `metrics.jsonl`: step, loss, tokens/s, load balance, ETA."""

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from moe_ray.storage import Storage
from moe_ray.telemetry.run_log import read_metrics


class ProgressLine:
    """Draws a bar on a terminal; elsewhere prints one line for each logged step."""

    def __init__(self, run: Path | Storage, total_steps: int, stream: TextIO | None = None) -> None:
        self._run = run
        self._total = total_steps
        self._stream = stream or sys.stderr
        self._bar: tqdm | None = None
        # What earlier attempts of the run logged is not news.
        self._step = max((metrics["step"] for metrics in read_metrics(run)), default=0)

    def update(self) -> None:
        """Show what was logged since the last call."""
        for metrics in read_metrics(self._run):
            if metrics["step"] > self._step:
                self._show(metrics)
                self._step = metrics["step"]

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _show(self, metrics: dict[str, Any]) -> None:
        eta = timedelta(seconds=round((self._total - metrics["step"]) * metrics["step_seconds"]))
        loss = metrics["loss"]
        summary = (
            f"loss {'skipped' if loss is None else f'{loss:.3f}'}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"load cv {metrics['load_cv'] or 0:.2f}  ETA {eta}"
        )
        if metrics.get("dropped_fraction"):
            summary += f"  dropped {metrics['dropped_fraction']:.0%}"
        if metrics.get("dead_experts"):
            summary += f"  dead experts {metrics['dead_experts']}"
        if metrics.get("val_perplexity") is not None:
            summary += f"  val perplexity {metrics['val_perplexity']:.1f}"
        if not self._stream.isatty():
            print(f"step {metrics['step']}/{self._total}  {summary}", file=self._stream, flush=True)
            return
        if self._bar is None:
            layout = "{desc} {percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt} {postfix}"
            self._bar = tqdm(
                total=self._total, initial=self._step, file=self._stream, bar_format=layout, desc="training"
            )
        self._bar.set_postfix_str(summary, refresh=False)
        self._bar.update(metrics["step"] - self._bar.n)


@contextmanager
def show_progress(run: Path | Storage, total_steps: int) -> Generator[None]:
    """Follow the run from a thread while the block runs."""
    line = ProgressLine(run, total_steps)
    done = threading.Event()

    def follow() -> None:
        while not done.wait(0.5):
            line.update()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        line.update()
        line.close()
