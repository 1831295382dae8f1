"""Files that survive a loss of power."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file or directory to the disk, so that a rename that follows cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
