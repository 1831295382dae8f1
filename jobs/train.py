"""Train a Mixture-of-Experts language model, or go on with a run that was interrupted.

usage: python jobs/train.py CONFIG [section.field=value ...]
       ray job submit --working-dir . -- python jobs/train.py CONFIG [section.field=value ...]
"""

from jobs.cli import run_job
from moe_ray.config import Config
from moe_ray.telemetry.logs import setup_logging


def main(config: Config) -> None:
    """Train, then say where the run is."""
    # Here, so that a mistake in the settings is answered before torch and Ray are imported.
    from moe_ray.training.launcher import run_training

    setup_logging(config.telemetry.log_level)
    run_dir = run_training(config)
    print(f"run directory: {run_dir}")


if __name__ == "__main__":
    run_job(__doc__, main)
