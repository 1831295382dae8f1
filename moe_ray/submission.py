"""What a driver knows of its submission to Ray's job server, and where such a driver may not write."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_ray.config import Config
from moe_ray.errors import ConfigError

# Ray gives it to the driver alone; processes that the driver starts itself inherit it.
_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_ID, _NAME = "job_submission_id", "job_name"


@dataclass(frozen=True)
class Submission:
    """A job of Ray's job server.

    Attributes:
        id: what `ray job stop` and `ray job logs` take.
        metadata: that of `--metadata-json`.
    """

    id: str
    metadata: Mapping[str, str]


def read_submission() -> Submission | None:
    """Of this driver; None if it was started otherwise."""
    if _VARIABLE not in os.environ:
        return None
    metadata = dict(json.loads(os.environ[_VARIABLE])["metadata"])
    metadata.pop(_NAME, None)
    return Submission(metadata.pop(_ID), metadata)


def inherited() -> dict[str, str]:
    """Variables with which another process reads the same submission."""
    return {_VARIABLE: os.environ[_VARIABLE]} if _VARIABLE in os.environ else {}


def lasting(name: str, given: str) -> Path:
    """The absolute path of what is to be written.

    Args:
        name: of the setting or argument.
        given: its value.

    Raises:
        ConfigError: it is relative to the working directory of a submitted job, which Ray removes.
    """
    path = Path(given).expanduser()
    if not path.is_absolute() and read_submission() is not None:
        raise ConfigError(
            f"{name}={given!r} is relative, and a job's working directory does not last.",
            "give an absolute path, such as ~/moe_ray or /mnt/shared/moe_ray.",
        )
    return path.resolve()


def with_absolute_storage(config: Config) -> Config:
    """The same settings for every process, whatever its working directory.

    Raises:
        ConfigError: a path is relative in a submitted job.
    """
    # Not through all settings as a tree: which of them were set must stay known.
    if "://" not in config.train.storage:
        train = {"storage": str(lasting("train.storage", config.train.storage))}
        config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    if config.data.path is not None:
        data = {"path": str(lasting("data.path", config.data.path))}
        config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    return config
