"""Errors that a user meets. Each message names what was wrong and each carries the fix.

A job that ends with one of these prints its single line and exits with `exit_code`.
"""

# What a rank says that failed only because another one did.
ANOTHER_RANK = "another rank failed."


class MoeRayError(Exception):
    """Base of every error of this package.

    Args:
        problem: what is wrong, with the field or file and the value.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem, fix)
        self.problem = problem
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.problem} Fix: {self.fix}"


class UserError(MoeRayError):
    """The input is wrong; retrying the same thing cannot help."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or impossible in combination."""


class DataError(UserError):
    """A text source or a prepared data set is missing, empty or unreadable."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or does not fit the model."""


class RequestError(UserError):
    """A generation request cannot be served as it is (an HTTP 4xx).

    Args:
        param: the request field at fault, as the OpenAI error body names it.
        status: the HTTP status code.
        code: the OpenAI error code, such as `context_length_exceeded`.
        retry_after: seconds after which it may work, of a 429 or 503.
    """

    def __init__(
        self,
        problem: str,
        fix: str,
        *,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(problem, fix)
        self.param = param
        self.status = status
        self.code = code
        self.retry_after = retry_after


class StorageError(MoeRayError):
    """Storage failed: no space left, no permission, an I/O error.

    Args:
        transient: it may work later without anybody changing a setting, a right or the space.
    """

    def __init__(self, problem: str, fix: str, *, transient: bool = False) -> None:
        super().__init__(problem, fix)
        self.transient = transient


class TrainingError(MoeRayError):
    """Training cannot go on."""


class OutOfMemoryError(TrainingError):
    """A training step needs more memory than its device or machine has left."""
