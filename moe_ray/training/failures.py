"""What lies behind a failure of Ray Train."""

from collections.abc import Sequence

from ray.train import TrainingFailedError, WorkerGroupError

from moe_ray.errors import ANOTHER_RANK, MoeRayError, TrainingError

# Where Ray's exceptions keep what they wrap.
_WRAPPED = ("cause", "_base_exc", "health_check_failure", "controller_failure")


def root_causes(error: BaseException) -> list[BaseException]:
    """The error and all that it wraps, those of lower ranks first."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    causes: list[BaseException] = []
    for start in [failure for _, failure in sorted(failures.items())] or [error]:
        cause: BaseException | None = start
        while cause is not None and cause not in causes:
            causes.append(cause)
            wrapped = (
                getattr(cause, name, None)
                for name in ("cause", "_base_exc", "health_check_failure", "controller_failure")
            )
            cause = next((inner for inner in wrapped if isinstance(inner, BaseException)), cause.__cause__)
    return causes


def our_error(causes: Sequence[BaseException]) -> MoeRayError | None:
    """The one of ours among them that says most: a rank's own trouble before its word that another one failed."""
    ours = [cause for cause in causes if isinstance(cause, MoeRayError)]
    return next((error for error in ours if error.problem != ANOTHER_RANK), None)


def as_our_error(error: TrainingFailedError) -> MoeRayError:
    """What the user is told."""
    causes = root_causes(error)
    found = our_error(causes)
    if found is not None:
        return found
    lines = str(causes[0]).strip().splitlines() or [""]
    return TrainingError(
        f"a training worker failed: {type(causes[0]).__name__}: {lines[-1]}.",
        "see the worker's log in the Ray dashboard; the same command goes on from the newest checkpoint, if there "
        "is one.",
    )
