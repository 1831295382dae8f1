"""Killed writers, a network that breaks and a server that stays away."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from moe_ray.errors import StorageError
from moe_ray.storage import open_storage
from moe_ray.storage.breaker import Breaker
from tests.s3_server import S3Server
from tests.waiting import until

_MB = 1 << 20

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
def test_a_writer_killed_in_an_upload_leaves_no_part(breakable_s3: S3Server, before: bytes | None) -> None:
    storage = open_storage(breakable_s3.fresh_uri())
    if before is not None:
        storage.write("a/file", before)
    breakable_s3.proxy.freeze_after(15 * _MB)
    writer = start_writer(storage.uri, "x")
    assert breakable_s3.proxy.broken.wait(60)
    kill(writer)
    breakable_s3.proxy.mend()
    storage.clean()
    assert storage.list() == (["a/file"] if before is not None else [])
    assert before is None or storage.read("a/file") == before


def test_an_interrupted_upload_leaves_no_part(breakable_s3: S3Server) -> None:
    storage = open_storage(breakable_s3.fresh_uri())
    storage.write("a/file", b"old")
    breakable_s3.proxy.freeze_after(1)
    writer = start_writer(storage.uri, "x")
    assert breakable_s3.proxy.broken.wait(60)
    writer.send_signal(signal.SIGINT)
    breakable_s3.proxy.mend()
    assert writer.wait(60) != 0
    assert storage.read("a/file") in (b"old", b"x" * 40 * _MB)


@pytest.mark.parametrize("num_bytes", [1, 20 * _MB])
def test_a_failed_upload_publishes_nothing_later(breakable_s3: S3Server, num_bytes: int) -> None:
    storage = open_storage(breakable_s3.fresh_uri(), retry_seconds=0)
    storage.write("file", b"old")
    breakable_s3.proxy.cut_after(num_bytes)
    with pytest.raises(StorageError) as caught:
        storage.write("file", bytes(40 * _MB))
    breakable_s3.proxy.mend()
    del caught
    gc.collect()
    assert storage.read("file") == b"old"


@pytest.mark.parametrize("deed", ["upload", "download"])
def test_a_network_that_comes_back_only_delays(breakable_s3: S3Server, tmp_path: Path, deed: str) -> None:
    storage = open_storage(breakable_s3.fresh_uri())
    content = os.urandom(50 * _MB)
    if deed == "download":
        storage.write("file", content)

    def mend_later() -> None:
        assert breakable_s3.proxy.broken.wait(60)
        # The length of the outage, longer than the client's own retries last.
        time.sleep(3)
        breakable_s3.proxy.mend()

    breakable_s3.proxy.cut_after(20 * _MB)
    mender = threading.Thread(target=mend_later)
    mender.start()
    if deed == "upload":
        storage.write("file", content)
        mender.join(1)
        assert not mender.is_alive()
    storage.fetch("file", tmp_path / "copy")
    mender.join()
    assert (tmp_path / "copy").read_bytes() == content


def test_a_dead_server_is_left_alone_for_a_while(breakable_s3: S3Server) -> None:
    storage = open_storage(breakable_s3.fresh_uri(), retry_seconds=0.5, breaker=Breaker(threshold=3, seconds=2.0))
    storage.write("file", b"1")
    breakable_s3.proxy.cut()
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(
            StorageError, match=r"file' could not be read.*connect.*Fix: mend the storage"
        ) as caught:
            storage.read("file")
        assert time.monotonic() - start >= 0.5
        assert caught.value.transient
    start = time.monotonic()
    breakable_s3.proxy.mend()
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


def test_a_silent_server_is_not_waited_for_without_end(breakable_s3: S3Server) -> None:
    storage = open_storage(breakable_s3.fresh_uri(), retry_seconds=1.0)
    breakable_s3.proxy.freeze()
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
