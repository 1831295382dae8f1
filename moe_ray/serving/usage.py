"""What one HTTP request took, filled in on its way and read when it ends."""

import itertools
import uuid
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from moe_ray.serving.api_keys import ApiKey


@dataclass
class Usage:
    """The request that this context works on.

    Attributes:
        key: who asks; None: anybody may, or nobody known did.
        prompt: what was asked, as it was sent.
    """

    request_id: str = ""
    key: ApiKey | None = None
    prompt: Any = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


_process = uuid.uuid4().hex[:16]
_numbers = itertools.count()
_current: ContextVar[Usage] = ContextVar("usage")


def new_id() -> str:
    """32 hexadecimal digits that nobody else has. Not a uuid4: its system call lets other threads run first."""
    return f"{_process}{next(_numbers):016x}"


def current_usage() -> Usage:
    """That of this context; outside of a request one that nobody reads."""
    return _current.get(Usage())


def begin_usage(request_id: str) -> Usage:
    """Begin that of a request, in whose context it stays."""
    usage = Usage(request_id)
    _current.set(usage)
    return usage


def request_fields() -> dict[str, str | None]:
    """What log lines say of the request that they are about."""
    return {"request": current_usage().request_id or None}
