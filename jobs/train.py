"""Train a Mixture-of-Experts language model, or go on with a run that was interrupted.

usage: python jobs/train.py CONFIG [section.field=value ...]
       ray job submit --working-dir . -- python jobs/train.py CONFIG [section.field=value ...]
"""

from jobs.cli import run_job
from moe_ray.config import Config
from moe_ray.errors import TrainingError
from moe_ray.telemetry.logs import setup_logging


def main(config: Config) -> None:
    """Train, then say where the run is.

    Raises:
        TrainingError: a signal ended the run before its last step.
    """
    # Here, so that a mistake in the settings is answered before torch and Ray are imported.
    from moe_ray.training.launcher import run_training

    setup_logging(config.telemetry, run=config.train.name)
    steps = run_training(config)
    if steps < config.train.last_step:
        raise TrainingError(
            f"a signal ended the run after step {steps} of {config.train.last_step}; that step is saved.",
            "run the same command to go on.",
        )
    where = config.train.run_uri if "://" in config.train.storage else config.train.run_dir.resolve()
    print(f"run directory: {where}")


if __name__ == "__main__":
    run_job(__doc__, main)
