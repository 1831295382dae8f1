"""TensorBoard: event files, which `tensorboard --logdir FOLDER` shows."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

from tensorboardX import SummaryWriter

from moe_ray.config import to_yaml
from moe_ray.telemetry.trackers.run import Log, TrackedRun


@contextmanager
def track(run: TrackedRun) -> Generator[Log]:
    """Write to `FOLDER/tensorboard/NAME`; steps that are done again replace those of before."""
    folder = run.folder / "tensorboard" / run.config.train.name
    # Files of one second would have one name.
    with SummaryWriter(
        str(folder), purge_step=run.resumed_step + 1, filename_suffix=f".{run.resumed_step}"
    ) as writer:
        writer.add_text("settings", f"```yaml\n{to_yaml(run.config)}```", run.resumed_step)

        def log(step: int, numbers: Mapping[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        yield log
