"""Storage on a disk and in a real S3 server: files, names, addresses, errors."""

import errno
import os
import re
import threading
import time
from pathlib import Path

import pytest

from moe_ray.errors import ConfigError, StorageError
from moe_ray.storage import Storage, open_storage
from moe_ray.storage.retry import is_transient
from tests.s3_server import S3Server

_MB = 1 << 20


@pytest.fixture
def storage(storage_uri: str) -> Storage:
    return open_storage(storage_uri)


@pytest.mark.parametrize("size", [0, 1, 50 * _MB])
def test_what_is_written_is_read(storage: Storage, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    storage.write("a/b.bin", memoryview(content))
    assert storage.read("a/b.bin") == content
    storage.fetch("a/b.bin", tmp_path / "new" / "copy.bin")
    assert (tmp_path / "new" / "copy.bin").read_bytes() == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy.bin"]


def test_files_are_replaced_listed_and_deleted(storage: Storage) -> None:
    assert storage.list() == storage.list("a") == []
    for name in ("a/b/2", "a/b/1", "a b/ü%20?#", "top"):
        storage.write(name, b"old and long")
        storage.write(name, name.encode())
    assert storage.list() == ["a b/ü%20?#", "a/b/1", "a/b/2", "top"]
    assert storage.list("a") == storage.list("a/b") == ["a/b/1", "a/b/2"]
    assert storage.read("a b/ü%20?#") == "a b/ü%20?#".encode()
    assert storage.exists("a/b/1")
    assert not storage.exists("a/b")
    assert not storage.exists("a/b/3")
    storage.delete("a/b/1")
    storage.delete("a/b/1")
    storage.delete("a b")
    storage.delete("absent/folder")
    assert storage.list() == ["a/b/2", "top"]


def test_no_empty_folder_stays(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    child = storage.child("checkpoints").child("step-1")
    child.write("model", b"1")
    storage.write("other/file", b"1")
    child.delete("model")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_child_is_a_folder_of_its_parent(storage: Storage) -> None:
    child = storage.child("checkpoints").child("step 1")
    child.write("x/model", b"1")
    assert storage.read("checkpoints/step 1/x/model") == b"1"
    assert child.list() == child.list("x") == ["x/model"]
    assert open_storage(child.uri).read("x/model") == b"1"
    assert (child.local is None) == (storage.local is None)
    assert child.local is None or (child.local / "x" / "model").read_bytes() == b"1"


def test_missing_files_are_reported_as_such(storage: Storage, tmp_path: Path) -> None:
    storage.write("folder/file", b"")
    with pytest.raises(FileNotFoundError, match="absent"):
        storage.read("absent")
    with pytest.raises(FileNotFoundError, match="folder/absent"):
        storage.fetch("folder/absent", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".tmp-1/x", "a/.lock", "\0"]
)
def test_names_cannot_lead_out(storage: Storage, tmp_path: Path, name: str) -> None:
    operations = [storage.read, storage.exists, storage.delete, storage.child]
    operations += [lambda name: storage.write(name, b""), lambda name: storage.fetch(name, tmp_path / "x")]
    for operation in operations:
        with pytest.raises(StorageError, match="cannot name a file"):
            operation(name)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "empty path"),
        ("ftp://host/x", "unknown scheme 'ftp'"),
        ("s3://bucket/x?endpoint=1", "unknown setting 'endpoint'.*endpoint_override, scheme, region"),
        ("s3://bucket/x?secret_key=hush", "unknown setting 'secret_key'"),
        ("gs://bucket/x?region=1", "unknown setting 'region'"),
        ("s3://key:hush@bucket/x", "user or password.*AWS_ACCESS_KEY_ID"),
        ("s3:/bucket/x", "no bucket"),
        ("s3://bucket/../x", r"'\.\.'"),
        ("s3://bucket/x?scheme=ftp", "scheme='ftp'"),
    ],
)
def test_odd_addresses_are_refused(uri: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_storage(uri)
    assert "hush" not in str(caught.value)


def test_google_cloud_storage_is_opened() -> None:
    storage = open_storage("gs://bucket/a/b").child("c")
    assert (storage.uri, storage.local) == ("gs://bucket/a/b/c", None)


def test_readers_never_see_a_mixture(storage: Storage, tmp_path: Path) -> None:
    contents = [bytes([letter]) * (_MB * (1 + letter % 3)) for letter in range(6)]
    storage.write("file", contents[0])
    ended = threading.Event()

    def overwrite() -> None:
        while not ended.is_set():
            for content in contents:
                storage.write("file", content)

    writer = threading.Thread(target=overwrite)
    writer.start()
    try:
        for _ in range(20):
            assert storage.read("file") in contents
            storage.fetch("file", tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() in contents
    finally:
        ended.set()
        writer.join()


def test_deleting_the_last_file_does_not_disturb_a_writer(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)

    def write_and_delete(name: str) -> None:
        for _ in range(150):
            storage.write(f"a/b/{name}", b"1")
            assert storage.read(f"a/b/{name}") == b"1"
            storage.delete(f"a/b/{name}")

    failures: list[BaseException] = []

    def run(name: str) -> None:
        try:
            write_and_delete(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_nothing(small_disk: Path, tmp_path: Path) -> None:
    storage = open_storage(small_disk / "run")
    storage.write("file", b"old")
    (tmp_path / "large").write_bytes(bytes(3 * _MB))
    start = time.monotonic()
    with pytest.raises(
        StorageError, match=r"run/file' could not be written: No space left.*Fix: free space"
    ) as caught:
        storage.write("file", bytes(3 * _MB))
    with pytest.raises(StorageError, match="No space left"):
        open_storage(tmp_path).fetch("large", small_disk / "copy")
    assert time.monotonic() - start < 5
    assert not caught.value.transient
    assert storage.read("file") == b"old"
    assert sorted(path.name for path in small_disk.rglob("*")) == ["file", "run"]


def test_what_no_retry_can_mend_is_raised_at_once(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    start = time.monotonic()
    for storage in (open_storage(tmp_path / "file"), open_storage(s3.fresh_uri())):
        for _ in range(7):
            with pytest.raises(StorageError, match=r"could not be written.*Fix: check the address") as caught:
                storage.write("folder/name", b"1")
            assert not caught.value.transient
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *((OSError(number, ""), True) for number in (errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN)),
        *((OSError(number, ""), False) for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)),
        *((OSError(number, ""), False) for number in (errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.EISDIR)),
        (OSError("AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7"), True),
        (OSError("AWS Error SLOW_DOWN during PutObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 503) during PutObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 429) during PutObject operation"), True),
        (OSError("AWS Error UNKNOWN (HTTP status 400) during PutObject operation: ExpiredToken"), False),
        (OSError("AWS Error ACCESS_DENIED during HeadObject operation: No response body."), False),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject operation"), False),
        (OSError("google::cloud::Status(UNAVAILABLE: Retry policy exhausted)"), True),
        (OSError("google::cloud::Status(PERMISSION_DENIED: Permanent error)"), False),
        (ValueError(""), False),
    ],
    ids=lambda value: re.sub(r"\W+", "-", str(value)),
)
def test_errors_that_pass_are_told_from_others(error: Exception, passes: bool) -> None:
    assert is_transient(error) == passes
