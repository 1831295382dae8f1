"""Weights & Biases: offline by default, to be sent with `wandb sync` later."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import wandb

from moe_ray.telemetry.trackers.run import Log, TrackedRun


@contextmanager
def track(run: TrackedRun) -> Generator[Log]:
    """Log to the run with this one's id."""
    telemetry = run.config.telemetry
    folder = run.folder
    folder.mkdir(parents=True, exist_ok=True)
    with wandb.init(
        project=telemetry.project,
        name=run.config.train.name,
        id=run.id,
        resume="allow",
        dir=str(folder),
        mode=telemetry.wandb_mode,
        config=run.settings,
        # The metrics are all that is said: not what the process prints, nor the machine, nor the code.
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_save_requirements=False,
        ),
    ) as tracked:
        # An own axis: W&B's counts what it was sent, and refuses steps that are done again after a restart.
        tracked.define_metric("*", step_metric="step")

        def log(step: int, numbers: Mapping[str, float]) -> None:
            tracked.log({**numbers, "step": step})

        yield log
