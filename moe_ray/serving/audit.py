"""The audit log: a JSON line for each request."""

import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

from moe_ray.errors import ConfigError

# A line is one write, so that those of several replicas do not mix; prompts are as large as max_body_bytes.
_BUFFER_BYTES = 2**23


class _PrivateFile(WatchedFileHandler):
    """For its owner only; opened again after a rotation."""

    def _open(self) -> TextIOWrapper:
        def private(path: str, flags: int) -> int:
            return os.open(path, flags, 0o600)

        return open(self.baseFilename, "a", _BUFFER_BYTES, encoding="utf-8", opener=private)


class AuditLog:
    """Lines to a file, or to stderr.

    Args:
        target: a path or `stderr`.
        with_prompts: whether lines hold what was asked.

    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, target: str, with_prompts: bool) -> None:
        self.with_prompts = with_prompts
        # Known to nobody else, so that no setting of other loggers adds to it or drops lines.
        self._logger = logging.Logger("moe_ray.audit", logging.INFO)
        try:
            handler = (
                logging.StreamHandler(sys.stderr)
                if target == "stderr"
                else _PrivateFile(Path(target).expanduser())
            )
        except OSError as error:
            raise ConfigError(
                f"serve.audit_log={target} cannot be written: {error.strerror}.",
                "give a path in a folder that exists.",
            ) from None
        self._logger.addHandler(handler)

    def write(self, fields: Mapping[str, Any]) -> None:
        """Add a line with these fields and the time (UTC)."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._logger.info("%s", json.dumps({"time": now, **fields}, separators=(",", ":")))

    def close(self) -> None:
        """Close the file."""
        for handler in self._logger.handlers:
            handler.close()
