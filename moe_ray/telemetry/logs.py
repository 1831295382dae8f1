"""Log lines of every process: readable text or JSON, with what they are about, without secrets and repetitions."""

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from moe_ray.config import TelemetryConfig
from moe_ray.submission import read_submission
from moe_ray.telemetry.redact import Redactor
from moe_ray.telemetry.repeats import Repeats

_fields: dict[str, Any] = {}


def setup_logging(
    settings: TelemetryConfig, context: Callable[[], Mapping[str, Any]] = lambda: {}, **fields: Any
) -> None:
    """Write this package's log lines to stderr; other packages only warn.

    Args:
        context: fields of the line that is being written, such as the request it is about.
        fields: of all lines of this process, such as its run and rank; a driver knows its `submission` itself.
    """
    submission = read_submission()
    _fields.clear()
    set_log_fields(submission=submission.id if submission is not None else None)
    set_log_fields(**fields)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter((JsonLines if settings.log_format == "json" else TextLines)(context))
    handler.addFilter(Repeats())
    logging.getLogger().setLevel(logging.WARNING)
    ours = logging.getLogger("moe_ray")
    ours.handlers[:] = [handler]
    ours.propagate = False
    ours.setLevel(settings.log_level.upper())
    for name, level in settings.log_levels.items():
        logging.getLogger(name).setLevel(level.upper())


def set_log_fields(**fields: Any) -> None:
    """What all lines of this process say from now on, beside what they said; None takes a field away."""
    _fields.update(fields)


class _Lines(logging.Formatter):
    def __init__(self, context: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__()
        self._context = context
        self._redact = Redactor()

    def _fields_of(self, record: logging.LogRecord) -> dict[str, Any]:
        fields = {**_fields, **self._context()}
        suppressed = getattr(record, "suppressed", 0)
        if suppressed:
            fields["suppressed"] = suppressed
        return {name: value for name, value in fields.items() if value is not None}

    def _traceback_of(self, record: logging.LogRecord) -> str:
        return self._redact(self.formatException(record.exc_info)) if record.exc_info else ""


class TextLines(_Lines):
    """`12:00:00 INFO moe_ray.x: message [run=wiki rank=0]`, local time, a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and those of a traceback."""
        fields = " ".join(f"{name}={value}" for name, value in self._fields_of(record).items())
        time_of_day = self.formatTime(record, "%H:%M:%S")
        line = f"{time_of_day} {record.levelname} {record.name}: {self._redact(record.getMessage())}"
        return "\n".join(filter(None, (f"{line} [{fields}]" if fields else line, self._traceback_of(record))))


class JsonLines(_Lines):
    """An object a line: `time` (UTC), `level`, `logger`, `message`, the fields, `traceback` of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": self._redact(record.getMessage()),
            **self._fields_of(record),
        }
        traceback = self._traceback_of(record)
        return json.dumps(line | ({"traceback": traceback} if traceback else {}), default=str)
