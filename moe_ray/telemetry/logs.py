"""Log lines of every process of a job."""

import logging
import sys


def setup_logging(level: str) -> None:
    """Write this package's log lines of at least `level` to stderr; other packages only warn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
    logging.getLogger().setLevel(logging.WARNING)
    ours = logging.getLogger("moe_ray")
    ours.handlers[:] = [handler]
    ours.propagate = False
    ours.setLevel(level.upper())
