"""Train many runs with different settings and find the best, or go on with a sweep that was interrupted.

usage: python jobs/sweep.py CONFIG [section.field=value ...]
       ray job submit --working-dir . -- python jobs/sweep.py CONFIG [section.field=value ...]

The section `sweep` says what is varied; docs/sweeps.md explains it. The sweep's folder is STORAGE/NAME, with a run
folder for each trial, trials.jsonl, and best.yaml, which jobs/train.py takes as it is.
"""

import json

from jobs.cli import run_job
from moe_ray.config import Config
from moe_ray.errors import TrainingError
from moe_ray.telemetry.logs import setup_logging
from moe_ray.tuning.check import check_sweep


def main(config: Config) -> None:
    """Sweep, then say which trial is the best and where the sweep is.

    Raises:
        TrainingError: a signal ended the sweep, no trial has come to an evaluation, or too few runs of AutoML's
            ladder have finished.
    """
    check_sweep(config)
    # Here, so that a mistake in the settings is answered before torch and Ray are imported.
    from moe_ray.tuning.outcome import AUTO, BEST, best_trial
    from moe_ray.tuning.report.build import SWEEP_PAGE
    from moe_ray.tuning.sweep import run_sweep

    setup_logging(config.telemetry, run=config.train.name)
    board = run_sweep(config)
    best = best_trial(board)
    if best is None:
        reasons = {trial.reason for trial in board.trials.values() if trial.reason}
        raise TrainingError(
            f"no trial of {len(board.trials)} has an objective: {next(iter(reasons), 'none was evaluated')}",
            "mend what is at fault, and set another train.name.",
        )
    if config.sweep.auto:
        found = json.loads(board.storage.read(AUTO))
        loss = "predicted loss {middle:.3f} (90%: {low:.3f} to {high:.3f})".format(**found["loss"])
        print("\n".join([f"recommended: {found['label']}; {loss}", *found["warnings"]]))
    else:
        print(f"best trial: {best.number}, {config.sweep.metric} {best.metrics[config.sweep.metric]:.4f}")
    print(f"sweep directory: {board.storage.uri}")
    print(f"best settings: {board.storage.uri}/{BEST}")
    print(f"page: {board.storage.uri}/{SWEEP_PAGE}")


if __name__ == "__main__":
    run_job(__doc__, main)
