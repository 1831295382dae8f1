"""From a path or URI to its storage."""

import re
from datetime import timedelta
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from pyarrow.fs import AwsStandardS3RetryStrategy, FileSystem, GcsFileSystem, S3FileSystem, resolve_s3_region

from moe_ray.errors import ConfigError
from moe_ray.storage.base import Storage
from moe_ray.storage.breaker import Breaker
from moe_ray.storage.local import LocalStorage
from moe_ray.storage.object_store import ObjectStorage
from moe_ray.storage.retry import Policy

_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_KEYS = {"s3": ("endpoint_override", "scheme", "region"), "gs": ("endpoint_override", "scheme")}
_LONGEST_REQUEST_SECONDS = 15.0
_LONGEST_CONNECT_SECONDS = 5.0


def open_storage(uri: str | Path, retry_seconds: float = 60.0, breaker: Breaker | None = None) -> Storage:
    """Open a folder; it need not exist yet.

    Args:
        uri: a path, `s3://bucket/folder` or `gs://bucket/folder`. `?endpoint_override=HOST:PORT&scheme=http` names
            another server than the provider's, `region` is for S3 only. Credentials come from the environment.
        retry_seconds: for how long after its first failure an operation is tried again.
        breaker: one to share with other storages that fail together with this one; None: a new one.

    Raises:
        ConfigError: the URI is of another kind, has unknown settings or holds credentials.
        StorageError: the region of an S3 bucket could not be found out.
    """
    policy = Policy(retry_seconds, breaker or Breaker())
    if isinstance(uri, Path) or not _URI.match(uri):
        if not str(uri):
            raise ConfigError("the storage is given as an empty path.", "name a folder or an s3:// or gs:// URI.")
        folder = Path(uri).expanduser().absolute()
        return LocalStorage(folder, folder, policy)
    parts = urlsplit(uri)
    _check_authority(parts)
    if parts.scheme not in _KEYS:
        raise ConfigError(
            f"the storage {uri!r} has the unknown scheme {parts.scheme!r}.",
            "use a path, s3://bucket/folder or gs://bucket/folder.",
        )
    settings = _settings(parts)
    prefix = "/".join(part for part in (parts.netloc, *unquote(parts.path).split("/")) if part)
    open_filesystem = _open_s3 if parts.scheme == "s3" else _open_gcs
    filesystem = open_filesystem(parts.netloc, settings, policy)
    return ObjectStorage(filesystem, parts.scheme, prefix, urlencode(settings, safe=":/"), policy)


def _check_authority(parts: SplitResult) -> None:
    shown = f"{parts.scheme}://...{parts.path}"
    if "@" in parts.netloc:
        raise ConfigError(
            f"the storage {shown!r} holds a user or password.",
            "leave them out; credentials come from the environment, such as AWS_ACCESS_KEY_ID.",
        )
    if not parts.netloc or parts.fragment or ".." in parts.path.split("/"):
        raise ConfigError(
            f"the storage {shown!r} names no bucket, or has a '#' or '..'.",
            "write it as s3://bucket/folder, with %23 for a '#'.",
        )


def _settings(parts: SplitResult) -> dict[str, str]:
    allowed = _KEYS[parts.scheme]
    settings = dict(parse_qsl(parts.query, keep_blank_values=True))
    for key in settings:
        if key not in allowed:
            raise ConfigError(
                f"the storage {parts.scheme}://{parts.netloc}{parts.path} has the unknown setting {key!r}.",
                f"only {', '.join(allowed)} can be set; credentials come from the environment.",
            )
    if settings.get("scheme", "https") not in ("http", "https"):
        raise ConfigError(f"scheme={settings['scheme']!r} of the storage is unknown.", "use http or https.")
    return settings


def _open_s3(bucket: str, settings: dict[str, str], policy: Policy) -> FileSystem:
    region = settings.get("region")
    if region is None and "endpoint_override" not in settings:
        region = policy.run(lambda: resolve_s3_region(bucket), "located", f"s3://{bucket}")
    # Silence is no progress: were it allowed to last, our own retries would come late.
    patience = max(1.0, policy.retry_seconds / 4)
    return S3FileSystem(
        endpoint_override=settings.get("endpoint_override"),
        scheme=settings.get("scheme", "https"),
        region=region,
        connect_timeout=min(_LONGEST_CONNECT_SECONDS, patience),
        request_timeout=min(_LONGEST_REQUEST_SECONDS, patience),
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
    )


def _open_gcs(bucket: str, settings: dict[str, str], policy: Policy) -> FileSystem:
    return GcsFileSystem(
        endpoint_override=settings.get("endpoint_override"),
        scheme=settings.get("scheme", "https"),
        retry_time_limit=timedelta(seconds=max(1.0, min(_LONGEST_REQUEST_SECONDS, policy.retry_seconds / 4))),
    )
