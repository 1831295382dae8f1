"""One driver a run: real processes that contend for a lease, on a disk and in an S3 server."""

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from moe_ray.errors import ConfigError
from moe_ray.storage import open_storage
from moe_ray.storage.lease import LEASE, fence, hold
from tests.s3_server import S3Server
from tests.waiting import until

# Not forked from a server that may have been started without the credentials.
_processes = get_context("spawn")


def contend(orders: Connection) -> None:
    """For each place that is sent, say whether its lease was got, and hold it until told what to do next."""
    while True:
        uri, seconds = orders.recv()
        try:
            with hold(open_storage(uri), seconds=seconds) as lease:
                orders.send("got")
                while orders.recv() == "is it mine?":
                    orders.send(lease.is_mine())
            orders.send("released")
        except ConfigError as error:
            orders.send(str(error))


class Driver:
    """A process that contends."""

    def __init__(self) -> None:
        self.orders, theirs = _processes.Pipe()
        self.process = _processes.Process(target=contend, args=(theirs,), daemon=True)
        self.process.start()
        self.pid = self.process.pid or 0

    def asks_for(self, uri: str, seconds: float) -> None:
        self.orders.send((uri, seconds))

    def answer(self) -> object:
        assert self.orders.poll(60), "no answer"
        return self.orders.recv()

    def says(self, order: str) -> object:
        self.orders.send(order)
        return self.answer()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture
def drivers() -> Iterator[tuple[Driver, Driver]]:
    two = Driver(), Driver()
    yield two
    for driver in two:
        driver.kill()


def test_of_two_that_start_at_once_exactly_one_goes_on(storage_uri: str, drivers: tuple[Driver, Driver]) -> None:
    for turn in range(8):
        place = open_storage(storage_uri).child(f"run-{turn}").uri
        for driver in drivers:
            driver.asks_for(place, 3.0)
        answers = [driver.answer() for driver in drivers]
        assert answers.count("got") == 1, answers
        assert "being trained by another job" in str(answers[1 - answers.index("got")])
        winner = drivers[answers.index("got")]
        assert winner.says("is it mine?") is True
        assert winner.says("end") == "released"
        assert open_storage(place).list() == []


def test_a_living_holder_is_left_alone(storage_uri: str, drivers: tuple[Driver, Driver]) -> None:
    first, second = drivers
    for _ in range(2):
        first.asks_for(storage_uri, 2.0)
        assert first.answer() == "got"
        second.asks_for(storage_uri, 2.0)
        refusal = str(second.answer())
        assert f"process {first.pid}, since 20" in refusal
        assert "Fix: wait for it or stop it, or set another train.name." in refusal
        assert first.says("is it mine?") is True
        assert first.says("end") == "released"


def test_the_lease_of_a_killed_holder_is_taken_over(storage_uri: str, drivers: tuple[Driver, Driver]) -> None:
    first, second = drivers
    on_disk = open_storage(storage_uri).local is not None
    seconds = 20.0 if on_disk else 2.0
    first.asks_for(storage_uri, seconds)
    assert first.answer() == "got"
    first.kill()
    start = time.monotonic()
    second.asks_for(storage_uri, seconds)
    assert second.answer() == "got"
    # On a disk the lock has gone with its process, and only the wait for others who write at once remains.
    assert (time.monotonic() - start < seconds) == on_disk
    assert second.says("end") == "released"


def test_a_dead_holder_of_another_machine_is_watched_first(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write(LEASE, b'{"token": "other", "host": "elsewhere", "machine": "other", "pid": 1}')
    start = time.monotonic()
    with pytest.raises(ConfigError, match="host elsewhere, process 1"), hold(storage, stop_waiting=lambda: True):
        pass
    with hold(storage, seconds=1.0) as lease:
        assert time.monotonic() - start >= 1.0
        assert lease.is_mine()


def test_a_holder_that_was_stopped_yields_to_its_successor(s3: S3Server, drivers: tuple[Driver, Driver]) -> None:
    first, second = drivers
    bucket = s3.fresh_uri()
    first.asks_for(bucket, 1.5)
    assert first.answer() == "got"
    first.signal(signal.SIGSTOP)
    second.asks_for(bucket, 1.5)
    assert second.answer() == "got"
    first.signal(signal.SIGCONT)
    assert first.says("is it mine?") is False
    assert first.says("end") == "released"
    assert second.says("is it mine?") is True
    assert second.says("end") == "released"


def test_workers_see_whose_lease_it_is(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    with hold(storage, seconds=1.0) as lease:
        assert fence(open_storage(storage_uri), lease.token)
        assert not fence(storage, "another")
        storage.write(LEASE, b'{"token": "another"}')
        assert not fence(storage, lease.token)
        assert not lease.is_mine()
    assert storage.read(LEASE) == b'{"token": "another"}'
    storage.delete(LEASE)
    assert not fence(storage, lease.token)
    storage.write(LEASE, b"damaged")
    assert not fence(storage, lease.token)


def test_a_lease_that_was_removed_is_lost(storage_uri: str) -> None:
    storage = open_storage(storage_uri)
    with hold(storage, seconds=1.0) as lease:
        storage.delete(LEASE)
        assert not lease.is_mine()
    assert not storage.exists(LEASE)


def test_a_broken_network_does_not_end_a_lease(breakable_s3: S3Server) -> None:
    storage = open_storage(breakable_s3.fresh_uri())
    with hold(storage, seconds=1.5) as lease:
        breakable_s3.proxy.cut()
        assert lease.is_mine()
        breakable_s3.proxy.mend()
        before = storage.read(LEASE)
        until(lambda: storage.read(LEASE) != before)
        assert lease.is_mine()
    assert not storage.exists(LEASE)
