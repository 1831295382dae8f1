"""Random streams that are functions of a text, so that all ranks and worlds draw the same numbers."""

import hashlib

import torch


def seeded_generator(key: str) -> torch.Generator:
    """A generator whose stream is a function of `key`."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
