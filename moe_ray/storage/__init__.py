"""Files of a run: in a folder of a disk or a network file system, or in an object store."""

from moe_ray.storage.base import Storage
from moe_ray.storage.uri import open_storage

__all__ = ["Storage", "open_storage"]
