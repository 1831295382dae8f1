"""Storage on a disk and in a real S3 server: files, errors, broken networks, killed writers."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_ray.errors import ConfigError, StorageError
from moe_ray.storage import Storage, open_storage
from moe_ray.storage.breaker import Breaker
from moe_ray.storage.retry import is_transient
from tests.s3_server import S3Server

_MB = 1 << 20


def until(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait for a condition; fails when it takes too long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.01)


def s3_uri(s3: S3Server) -> str:
    return s3.uri(f"tests/{uuid.uuid4().hex}")


@pytest.fixture(params=["disk", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place, once of each kind."""
    return str(tmp_path / "run") if request.param == "disk" else s3_uri(request.getfixturevalue("s3"))


@pytest.fixture
def storage(uri: str) -> Storage:
    return open_storage(uri)


@pytest.fixture
def mended(s3: S3Server) -> Iterator[S3Server]:
    """The server, whose network is whole again after the test."""
    yield s3
    s3.proxy.mend()


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


_WRITER = """
import sys
from moe_ray.storage import open_storage
storage = open_storage(sys.argv[1])
while True:
    for letter in sys.argv[2]:
        storage.write("a/file", letter.encode() * (40 << 20))
"""


def start_writer(uri: str, letters: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", _WRITER, uri, letters])


def kill(process: subprocess.Popen) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_writer_killed_on_a_disk_leaves_no_part(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write("a/file", b"old")
    left_over = []
    while not left_over:
        writer = start_writer(storage.uri, "xy")
        until(lambda: any(path.stat().st_size for path in tmp_path.glob("a/.tmp-*")))
        kill(writer)
        left_over = list(tmp_path.glob("a/.tmp-*"))
        assert storage.read("a/file") in (b"old", b"x" * 40 * _MB, b"y" * 40 * _MB)
        assert storage.list() == ["a/file"]
    storage.write("b/gone", b"")
    (tmp_path / "b" / "gone").rename(tmp_path / "b" / ".tmp-0")
    storage.clean()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "file"]


@pytest.mark.parametrize("before", [b"old", None])
def test_a_writer_killed_in_an_upload_leaves_no_part(mended: S3Server, before: bytes | None) -> None:
    storage = open_storage(s3_uri(mended))
    if before is not None:
        storage.write("a/file", before)
    mended.proxy.freeze_after(15 * _MB)
    writer = start_writer(storage.uri, "x")
    assert mended.proxy.broken.wait(60)
    kill(writer)
    mended.proxy.mend()
    storage.clean()
    assert storage.list() == (["a/file"] if before is not None else [])
    assert before is None or storage.read("a/file") == before


@pytest.mark.parametrize("deed", ["upload", "download"])
def test_a_network_that_comes_back_only_delays(mended: S3Server, tmp_path: Path, deed: str) -> None:
    storage = open_storage(s3_uri(mended))
    content = os.urandom(50 * _MB)
    if deed == "download":
        storage.write("file", content)

    def mend_later() -> None:
        assert mended.proxy.broken.wait(60)
        # The length of the outage, longer than the client's own retries last.
        time.sleep(3)
        mended.proxy.mend()

    mended.proxy.cut_after(20 * _MB)
    mender = threading.Thread(target=mend_later)
    mender.start()
    if deed == "upload":
        storage.write("file", content)
        assert not mender.join(1)
    storage.fetch("file", tmp_path / "copy")
    mender.join()
    assert (tmp_path / "copy").read_bytes() == content


def test_a_dead_server_is_left_alone_for_a_while(mended: S3Server) -> None:
    storage = open_storage(s3_uri(mended), retry_seconds=0.5, breaker=Breaker(threshold=3, seconds=2.0))
    storage.write("file", b"1")
    mended.proxy.cut()
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(
            StorageError, match=r"file' could not be read.*connect.*Fix: mend the storage"
        ) as caught:
            storage.read("file")
        assert time.monotonic() - start >= 0.5
        assert caught.value.transient
    start = time.monotonic()
    mended.proxy.mend()
    with pytest.raises(StorageError, match="left alone"):
        storage.child("folder").write("file", b"2")
    assert time.monotonic() - start < 0.5

    def is_let_through() -> bool:
        try:
            return storage.read("file") == b"1"
        except StorageError:
            return False

    until(is_let_through)
    assert time.monotonic() - start > 1.0
    storage.child("folder").write("file", b"2")


def test_a_silent_server_is_not_waited_for_without_end(mended: S3Server) -> None:
    storage = open_storage(s3_uri(mended), retry_seconds=1.0)
    mended.proxy.freeze()
    start = time.monotonic()
    with pytest.raises(StorageError, match="could not be looked up") as caught:
        storage.exists("file")
    assert time.monotonic() - start < 20
    assert caught.value.transient


def test_one_trial_at_a_time_closes_the_breaker() -> None:
    breaker = Breaker(threshold=2, seconds=0.2)
    for _ in range(2):
        assert breaker.admits()
        breaker.failed()
    assert not breaker.admits()
    until(breaker.admits)
    assert not breaker.admits()
    breaker.failed()
    assert not breaker.admits()
    until(breaker.admits)
    breaker.succeeded()
    assert breaker.admits()
    breaker.failed()
    assert breaker.admits()


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
    mended: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    start = time.monotonic()
    for storage in (open_storage(tmp_path / "file"), open_storage(s3_uri(mended))):
        for _ in range(7):
            with pytest.raises(StorageError, match="could not be written.*Fix: check the address") as caught:
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
