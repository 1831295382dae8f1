"""Log lines of every process of a job."""

import logging
import sys

_NOISY = ("ray", "httpx", "urllib3", "filelock")


def setup_logging(level: str) -> None:
    """Write this package's log lines of at least `level` to stderr; other packages only warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    root = logging.getLogger("moe_ray")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(level.upper())
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
