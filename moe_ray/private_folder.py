"""Folders of a node for what this user's processes make once and all of them read."""

import os
from pathlib import Path


def user_cache() -> Path:
    """`moe_ray` in the folder of XDG_CACHE_HOME or ~/.cache, not expanded."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "moe_ray"


def private_folder(folder: Path) -> Path:
    """Make a folder that only this user can enter, or check that nobody else can write to it; returns it expanded.

    Raises:
        OSError: it cannot be made, or others can write to it.
    """
    try:
        folder = folder.expanduser()
    except RuntimeError as error:
        raise OSError(str(error)) from error
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise PermissionError(f"others can write to {folder}")
    return folder
