"""API keys: random strings of 256 bits that the server knows by their SHA-256 only.

A plain hash is enough, for nobody can guess such a key; a password would need a slow one.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_ray.errors import ConfigError

KEYS_VARIABLE = "MOE_RAY_API_KEYS"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMIT = re.compile(r"[1-9][0-9]{0,11}")
_LINE = "NAME SHA256 [REQUESTS_PER_MINUTE [TOKENS_PER_MINUTE]]"


@dataclass(frozen=True)
class ApiKey:
    """Who may use the server.

    Attributes:
        digest: SHA-256 of the key.
        requests_per_minute, tokens_per_minute: of all replicas together; None: no limit.
    """

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


def make_key(name: str) -> tuple[str, str]:
    """A new key, and the line of it for the file of keys.

    Raises:
        ConfigError: the name is not allowed.
    """
    key = f"moe-{secrets.token_urlsafe(32)}"
    line = f"{name} {_digest(key).hex()}"
    parse_keys([line], "the new key")
    return key, line


def load_keys(path: str | None) -> tuple[ApiKey, ...]:
    """The keys of a file and of MOE_RAY_API_KEYS, where `;` separates lines; none if neither is there.

    Raises:
        ConfigError: a line is wrong, a name stands twice, or the file is missing, empty or open to others.
    """
    lines = [] if path is None else _read(Path(path).expanduser())
    keys = parse_keys(lines, f"serve.api_keys_file={path}")
    if path is not None and not keys:
        raise ConfigError(
            f"serve.api_keys_file={path} holds no key.", "add one with `python jobs/api_key.py NAME`."
        )
    keys += parse_keys(os.environ.get(KEYS_VARIABLE, "").split(";"), KEYS_VARIABLE)
    names = [key.name for key in keys]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the API key {name!r} stands twice.", "give each key a name of its own.")
    return keys


def find_key(keys: Sequence[ApiKey], presented: str) -> ApiKey | None:
    """The key that was presented, found in a time that does not depend on which it is."""
    digest = _digest(presented)
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def parse_keys(lines: Sequence[str], source: str) -> tuple[ApiKey, ...]:
    """The keys of lines, of which empty ones and those that begin with # count for nothing.

    Raises:
        ConfigError: a line is wrong.
    """
    keys = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            keys.append(_parse(words, f"line {number} of {source}"))
    return tuple(keys)


def _parse(words: list[str], where: str) -> ApiKey:
    # Never shows the words: somebody may have pasted the key itself.
    kinds = (_NAME, _DIGEST, _LIMIT, _LIMIT)
    good = 2 <= len(words) <= 4 and all(kind.fullmatch(word) for kind, word in zip(kinds, words, strict=False))
    if not good:
        raise ConfigError(f"{where} is no API key.", f"write {_LINE}, as `python jobs/api_key.py NAME` prints it.")
    return ApiKey(words[0], bytes.fromhex(words[1]), *map(int, words[2:]))


def _read(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(f"serve.api_keys_file={path} is open to others.", f"chmod 600 {path}")
            return file.read().splitlines()
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"serve.api_keys_file={path} cannot be read: {reason}.", "give the path of a text file of keys."
        ) from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
