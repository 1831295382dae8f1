"""A trial: an ordinary training run in Ray Tune's hands, of which its log is what Tune hears."""

import os
import threading
import time
from typing import Any

from ray import tune

from moe_ray.config import build_config
from moe_ray.errors import MoeRayError, UserError
from moe_ray.storage import open_storage
from moe_ray.telemetry.logs import setup_logging
from moe_ray.telemetry.records import is_step
from moe_ray.telemetry.run_log import METRICS, LogTail
from moe_ray.training.launcher import run_training
from moe_ray.training.trainer import StopSwitch

# At least so often Tune hears of a trial, and can end it.
_SECONDS = 2.0
_POLL_SECONDS = 0.25


class TrialRun(tune.Trainable):
    """Trains in a thread. A result has the records up to the next that has the objective.

    Results: `records`, of metrics.jsonl; `step` and, if reported, `score` of the last of them; `seconds` since the
    result before; of a run that failed `reason`, and `status` if trying again cannot help.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Start to train; settings, variables, what to report and after which step come in `config`."""
        self._arguments = config
        settings = build_config(config["settings"])
        os.environ |= config["environment"]
        setup_logging(settings.telemetry, run=settings.train.name)
        self._tail = LogTail(open_storage(settings.train.run_uri), METRICS)
        self._records: list[dict[str, Any]] = []
        self._told_at = time.monotonic()
        self._failure: Exception | None = None
        self._is_told = False
        self._switch = StopSwitch()

        def train() -> None:
            try:
                run_training(settings, self._switch)
            # Whatever it is, Tune hears of it.
            except Exception as error:
                self._failure = error

        self._thread = threading.Thread(target=train, name="train", daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        """Wait for news.

        Raises:
            RuntimeError: the run failed; the result before has said why.
        """
        if self._is_told:
            raise RuntimeError(str(self._failure))
        deadline = time.monotonic() + _SECONDS
        has_ended = self._look()
        while not (self._records or has_ended or time.monotonic() > deadline):
            self._thread.join(_POLL_SECONDS)
            has_ended = self._look()
        told = self._take()
        result: dict[str, Any] = {"records": told, "seconds": time.monotonic() - self._told_at, "done": False}
        self._told_at += result["seconds"]
        if told:
            result["step"] = told[-1]["step"]
        if has_ended and not self._records:
            result |= self._outcome()
        return result

    def cleanup(self) -> None:
        """End the run, if it still trains, with a checkpoint."""
        self._switch.press()
        self._thread.join()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Runs keep checkpoints of their own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Runs go on by themselves."""

    def _look(self) -> bool:
        """Read what is new; returns whether that was the end."""
        has_ended = not self._thread.is_alive()
        after = self._arguments["after"]
        self._records += [record for record in self._tail.new() if is_step(record) and record["step"] > after]
        return has_ended

    def _take(self) -> list[dict[str, Any]]:
        metric = self._arguments["metric"]
        ends = (place for place, record in enumerate(self._records) if record.get(metric) is not None)
        count = next(ends, len(self._records) - 1) + 1
        told, self._records = self._records[:count], self._records[count:]
        return [
            {name: value for name, value in record.items() if not name.endswith("_by_layer")} for record in told
        ]

    def _outcome(self) -> dict[str, Any]:
        failure = self._failure
        if failure is None:
            return {"done": True}
        if isinstance(failure, UserError):
            return {"done": True, "reason": _reason(failure), "status": "infeasible"}
        self._is_told = True
        return {"reason": _reason(failure)}


def _reason(failure: Exception) -> str:
    # Halves of characters, as in names of files that are no text, cannot be written down.
    said = str(failure).encode(errors="replace").decode()
    if isinstance(failure, MoeRayError):
        return said
    lines = said.strip().splitlines() or [""]
    return f"{type(failure).__name__}: {lines[-1]}"
