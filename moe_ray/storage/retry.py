"""Which errors of storage pass, how long they are waited out, and what the others are called."""

import errno
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from moe_ray.errors import StorageError
from moe_ray.storage.breaker import Breaker

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")
_FIRST_WAIT_SECONDS = 0.2
_LONGEST_WAIT_SECONDS = 5.0
_PASSING = frozenset(
    {
        errno.EAGAIN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EINTR,
        errno.EIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EPIPE,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
# Clients of object stores give no number, only a text. 408, 409 and 429 pass: a timeout, a conflict, throttling.
_REFUSALS = re.compile(
    r"ACCESS_DENIED|NO_SUCH_BUCKET|NO_SUCH_UPLOAD|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE"
    r"|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT|MISSING_AUTHENTICATION_TOKEN|REQUEST_TIME_TOO_SKEWED"
    r"|OPT_IN_REQUIRED|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|FAILED_PRECONDITION"
    r"|HTTP status (?!408|409|429)[34]\d\d"
)


@dataclass(frozen=True)
class Policy:
    """How a storage deals with errors.

    Attributes:
        retry_seconds: for how long after the first failure of an operation it is tried again.
        breaker: stops operations for a while when many have failed.
    """

    retry_seconds: float
    breaker: Breaker = field(default_factory=Breaker)

    def run(self, action: Callable[[], _T], deed: str, place: str, may_be_absent: bool = False) -> _T:
        """Run an operation that can be repeated.

        Args:
            action: the operation; it raises OSError or an Arrow error.
            deed: what it does, as in "could not be ...".
            place: the file it is about, printable.
            may_be_absent: report a missing file as such.

        Raises:
            FileNotFoundError: the file is missing and `may_be_absent`.
            StorageError: the operation failed or was not tried, for too many have failed.
        """
        if not self.breaker.admits():
            raise StorageError(
                f"{place!r} could not be {deed}: storage failed several times in a row and is left alone for now.",
                "mend the storage or the network and run the same command again.",
                transient=True,
            )
        try:
            result = self._retry(action, place)
        except FileNotFoundError as error:
            self.breaker.succeeded()
            if may_be_absent:
                raise FileNotFoundError(errno.ENOENT, "No such file", place) from None
            raise _explained(error, deed, place) from error
        except (OSError, pa.ArrowException) as error:
            (self.breaker.failed if is_transient(error) else self.breaker.succeeded)()
            raise _explained(error, deed, place) from error
        self.breaker.succeeded()
        return result

    def _retry(self, action: Callable[[], _T], place: str) -> _T:
        first_failure: float | None = None

        def has_failed_long_enough(state: RetryCallState) -> bool:
            nonlocal first_failure
            now = state.outcome_timestamp or 0.0
            first_failure = now if first_failure is None else first_failure
            return now - first_failure >= self.retry_seconds

        def report(state: RetryCallState) -> None:
            if state.attempt_number == 1 and state.outcome is not None:
                _logger.warning("trying %s again: %s", place, state.outcome.exception())

        retrying = Retrying(
            retry=retry_if_exception(is_transient),
            stop=has_failed_long_enough,
            wait=wait_random_exponential(multiplier=_FIRST_WAIT_SECONDS, max=_LONGEST_WAIT_SECONDS),
            before_sleep=report,
            reraise=True,
        )
        return retrying(action)


def is_transient(error: BaseException) -> bool:
    """Whether an error of storage may go away by itself."""
    if not isinstance(error, OSError):
        return False
    if error.errno is not None:
        return error.errno in _PASSING
    return not _REFUSALS.search(str(error))


def _explained(error: Exception, deed: str, place: str) -> StorageError:
    number = error.errno if isinstance(error, OSError) else None
    if is_transient(error):
        fix = "mend the storage or the network and run the same command again."
    elif number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        fix = "free space or raise the quota and run the same command again."
    elif number in (errno.EACCES, errno.EPERM, errno.EROFS) or (number is None and _REFUSALS.search(str(error))):
        fix = "check the address, and that you or the credentials in the environment may read and write there."
    else:
        fix = "check the address of the storage and what is there."
    cause = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return StorageError(f"{place!r} could not be {deed}: {cause.rstrip('.')}.", fix, transient=is_transient(error))
