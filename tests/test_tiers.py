"""Tiers below the KV cache: prefixes come back from memory and disk, and no damage or full disk changes a text."""

import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_ray.serving.engine.cache import bytes_per_block
from moe_ray.serving.engine.disk_tier import DiskTier
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.successors import MAX_PREDICTED, Successors
from moe_ray.serving.engine.tier_store import Tiering
from tests.damage import DAMAGES, fill, spoil
from tests.engines import MAX_CONTEXT, expected, make_model, make_request, make_tokenizer, run
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("one_thread")
BIG = 1 << 24

_WRITER = """
import pathlib
import sys
from moe_ray.serving.engine.disk_tier import DiskTier
tier = DiskTier(pathlib.Path(sys.argv[1]), 10 << 24)
while True:
    for number in range(256):
        tier.put(bytes([number]), bytes([number]) * (1 << 24))
"""
_COMPUTER = """
import pathlib
import sys
from tests.test_tiers import BIG, Tiering, make_model, make_tiny_engine, make_tokenizer, make_turns, run
tokenizer = make_tokenizer()
engine = make_tiny_engine(make_model(tokenizer), tokenizer, Tiering(0, pathlib.Path(sys.argv[1]), BIG))
run(engine, *make_turns(9))
engine.close()
"""


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def make_engine(model, tokenizer):
    """Engines whose cache holds little more than one context, with tiers below."""
    engines = []

    def make(tiering, identity="a model"):
        engines.append(make_tiny_engine(model, tokenizer, tiering, identity))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def make_tiny_engine(model, tokenizer, tiering, identity="a model"):
    """Its cache holds little more than one context."""
    return Engine(
        model,
        tokenizer,
        max_batch_size=2,
        max_context=MAX_CONTEXT,
        kv_cache_bytes=6 * bytes_per_block(model.config, torch.float32),
        tiering=tiering,
        identity=identity,
    )


def make_turns(number):
    """Prompts of 50 tokens that share nothing."""
    rng = random.Random(number)
    return [make_request(f"{number}-{i}", [rng.randrange(300) for _ in range(50)], max_tokens=3) for i in range(5)]


def check_texts(engine, model, tokenizer, requests):
    """Prefix tokens that were not computed, one request after another; every text is the right one."""
    before = engine.stats().prefix_hit_tokens
    for request in requests:
        assert run(engine, request)[0][:3] == expected(model, tokenizer, request)
    return engine.stats().prefix_hit_tokens - before


class TestHits:
    @pytest.mark.parametrize("on_disk", [False, True])
    def test_what_the_cache_evicted_comes_back(self, make_engine, model, tokenizer, tmp_path, on_disk):
        tiering = Tiering(0, tmp_path, BIG) if on_disk else Tiering(BIG)
        engine, requests = make_engine(tiering), make_turns(0)
        assert check_texts(engine, model, tokenizer, requests) == 0
        assert check_texts(engine, model, tokenizer, requests) == 5 * 48
        stats = engine.stats()
        hits = (stats.tier_memory_hits, stats.tier_disk_hits)
        assert hits[on_disk] > 0
        assert hits[not on_disk] == 0
        assert stats.blocks_used == 0

    def test_without_tiers_it_does_not(self, make_engine, model, tokenizer):
        engine, requests = make_engine(None), make_turns(0)
        check_texts(engine, model, tokenizer, requests)
        assert check_texts(engine, model, tokenizer, requests) == 0

    def test_what_comes_from_disk_is_in_memory_the_next_time(self, make_engine, model, tokenizer, tmp_path):
        requests = make_turns(1)
        writer = make_engine(Tiering(0, tmp_path, BIG))
        check_texts(writer, model, tokenizer, requests)
        writer.close()
        engine = make_engine(Tiering(BIG, tmp_path, BIG))
        check_texts(engine, model, tokenizer, requests)
        from_disk = engine.stats().tier_disk_hits
        assert from_disk == 15
        check_texts(engine, model, tokenizer, requests)
        assert engine.stats().tier_disk_hits == from_disk
        assert engine.stats().tier_memory_hits > 0

    def test_budgets_hold(self, make_engine, model, tokenizer, tmp_path):
        engine = make_engine(Tiering(60_000, tmp_path, 90_000))
        for number in range(4):
            check_texts(engine, model, tokenizer, make_turns(number))
        assert 0 < engine.stats().tier_memory_bytes <= 60_000
        assert 0 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= 90_000

    def test_cancelled_while_it_is_loaded(self, make_engine, model, tokenizer):
        engine, (first, second, *_) = make_engine(Tiering(BIG)), make_turns(2)
        engine.submit(first)
        engine.cancel(first.id)
        assert not engine.has_work
        assert check_texts(engine, model, tokenizer, [first, second]) == 0


class TestPrefetch:
    def test_the_next_turn_is_brought_into_memory(self, make_engine, model, tokenizer, tmp_path):
        engine = make_engine(Tiering(20_000, tmp_path, BIG, prefetch=True))
        (whole, *others) = make_turns(10)
        turn = make_request("turn", whole.prompt_ids[:17], max_tokens=1)
        again = make_request("again", whole.prompt_ids, max_tokens=1)
        check_texts(engine, model, tokenizer, [turn, whole])
        # They take the memory of both tiers above the disk.
        check_texts(engine, model, tokenizer, others)
        assert engine.stats().tier_prefetched == 0
        check_texts(engine, model, tokenizer, [turn])
        until(lambda: engine.stats().tier_prefetched == 2)
        from_disk = engine.stats().tier_disk_hits
        assert check_texts(engine, model, tokenizer, [again]) == 48
        stats = engine.stats()
        assert (stats.tier_prefetched, stats.tier_prefetch_hits) == (2, 2)
        assert stats.tier_disk_hits == from_disk

    def test_a_wrong_guess_costs_no_text(self, make_engine, model, tokenizer, tmp_path):
        engine = make_engine(Tiering(20_000, tmp_path, BIG, prefetch=True))
        (whole, *others) = make_turns(11)
        turn = make_request("turn", whole.prompt_ids[:17], max_tokens=1)
        other = make_request("other", [*whole.prompt_ids[:16], *others[0].prompt_ids[:30]], max_tokens=1)
        check_texts(engine, model, tokenizer, [turn, whole, *others, turn])
        until(lambda: engine.stats().tier_prefetched == 2)
        check_texts(engine, model, tokenizer, [other])
        assert engine.stats().tier_prefetch_hits == 0


class TestSuccessors:
    def test_what_followed_most_often_is_predicted(self):
        successors = Successors()
        for chain in ("abcd", "abcd", "abx", "qbcd"):
            successors.learn(letters(chain))
        assert successors.predict(b"a") == letters("bcd")
        assert successors.predict(b"d") == successors.predict(b"z") == []

    def test_nothing_is_predicted_where_all_is_open(self):
        successors = Successors()
        for letter in "bcdefgh":
            successors.learn(letters(f"a{letter}z"))
        assert successors.predict(b"a") == []
        assert successors.predict(b"h") == letters("z")

    def test_habits_change(self):
        successors = Successors()
        for _ in range(1000):
            successors.learn(letters("ab"))
        for _ in range(20):
            successors.learn(letters("ac"))
        assert successors.predict(b"a") == letters("c")

    def test_it_is_bounded(self):
        successors = Successors(max_blocks=100)
        chain = [number.to_bytes(2) for number in range(1000)]
        successors.learn(chain)
        assert successors.predict(chain[500]) == []
        assert successors.predict(chain[-50]) == chain[-49 : -49 + MAX_PREDICTED]
        assert all(successors.predict(before)[0] == after for before, after in pairwise(chain[-100:]))


def letters(text):
    return [letter.encode() for letter in text]


class TestDisk:
    def test_it_survives_a_restart_for_the_same_model_only(self, make_engine, model, tokenizer, tmp_path):
        requests = make_turns(3)
        first = make_engine(Tiering(0, tmp_path / "tier", BIG))
        check_texts(first, model, tokenizer, requests)
        first.close()
        again = make_engine(Tiering(0, tmp_path / "tier", BIG))
        assert check_texts(again, model, tokenizer, requests) == 5 * 48
        other = make_engine(Tiering(0, tmp_path / "tier", BIG), identity="another model")
        assert check_texts(other, model, tokenizer, requests) == 0
        assert os.stat(tmp_path / "tier").st_mode & 0o777 == 0o700
        assert all(os.stat(path).st_mode & 0o777 == 0o600 for path in (tmp_path / "tier").iterdir())

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_damaged_files_are_misses(self, make_engine, model, tokenizer, tmp_path, damage):
        requests = make_turns(4)
        writer = make_engine(Tiering(0, tmp_path, BIG))
        check_texts(writer, model, tokenizer, requests)
        writer.close()
        spoil(tmp_path, damage)
        engine = make_engine(Tiering(0, tmp_path, BIG))
        assert check_texts(engine, model, tokenizer, requests) == 0
        assert engine.stats().tier_damaged + engine.stats().tier_errors >= 5

    def test_a_disk_that_refuses_everything(self, make_engine, model, tokenizer, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        engine, requests = make_engine(Tiering(0, tmp_path / "file" / "tier", BIG)), make_turns(5)
        check_texts(engine, model, tokenizer, requests)
        assert check_texts(engine, model, tokenizer, requests) == 0
        assert engine.stats().tier_errors > 0

    def test_a_full_disk(self, make_engine, model, tokenizer, small_disk):
        engine, before, after = make_engine(Tiering(0, small_disk / "tier", BIG)), make_turns(7), make_turns(8)
        check_texts(engine, model, tokenizer, before)
        check_texts(engine, model, tokenizer, before[:1])
        kept = sorted((small_disk / "tier").iterdir())
        filler = fill(small_disk)
        check_texts(engine, model, tokenizer, after)
        assert check_texts(engine, model, tokenizer, before[:4]) == 4 * 48
        assert engine.stats().tier_errors > 0
        assert sorted((small_disk / "tier").iterdir()) == kept
        filler.unlink()
        check_texts(engine, model, tokenizer, after)
        assert check_texts(engine, model, tokenizer, after) == 5 * 48

    def test_files_of_others_are_left_alone(self, tmp_path):
        (tmp_path / "thesis.txt").write_bytes(bytes(5000))
        tier = DiskTier(tmp_path, 2000)
        for number in range(9):
            tier.put(bytes([number]), bytes(1000))
        assert (tmp_path / "thesis.txt").stat().st_size == 5000
        assert tier.get(bytes([8])) == bytes(1000)
        assert tier.num_bytes <= 2000

    def test_killed_while_it_writes(self, tmp_path):
        for _ in range(3):
            writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(tmp_path)])
            until(lambda: {path.name.startswith(".") for path in scan(tmp_path)} == {True, False})
            writer.kill()
            writer.wait()
            tier = DiskTier(tmp_path, 10 * BIG)
            read = [tier.get(bytes([number])) for number in range(256)]
            assert all(data is None or data == bytes([number]) * BIG for number, data in enumerate(read))
            assert any(read)
            assert tier.damaged == tier.errors == 0
        # What was left half written goes once its room is wanted.
        for number in range(12):
            tier.put(bytes([number]), bytes(BIG - number))
        assert not any(path.name.startswith(".") for path in tmp_path.iterdir())

    def test_another_process_finds_what_was_computed(self, make_engine, model, tokenizer, tmp_path):
        command = [sys.executable, "-c", _COMPUTER, str(tmp_path)]
        subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
        engine, requests = make_engine(Tiering(0, tmp_path, BIG)), make_turns(9)
        assert check_texts(engine, model, tokenizer, requests) == 5 * 48

    def test_two_replicas_share_a_folder(self, make_engine, model, tokenizer, tmp_path):
        one, other = (make_engine(Tiering(0, tmp_path, BIG)) for _ in range(2))
        requests = make_turns(6)
        check_texts(one, model, tokenizer, requests)
        one.close()
        assert check_texts(other, model, tokenizer, requests) == 5 * 48

    def test_what_was_used_least_recently_goes_first(self, tmp_path):
        tier = DiskTier(tmp_path, 10_000)
        for number in range(9):
            tier.put(bytes([number]), bytes(1000))
            os.utime(tmp_path / f"{bytes([number]).hex()}.tier", (number, number))
        assert tier.get(bytes([0])) == bytes(1000)
        tier.put(bytes([9]), bytes(1000))
        kept = {number for number in range(10) if bytes([number]) in tier}
        assert {0, 8, 9} <= kept
        assert 1 not in kept


def scan(folder):
    """The files of a folder, of which some may go meanwhile."""
    return list(folder.iterdir())


def test_blocks_of_every_type_are_read_as_they_were_written(make_engine):
    engine = make_engine(None)
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, engine._cache.read([1, 3]).shape, dtype=np.uint8)
    engine._cache.write([1, 3], data)
    np.testing.assert_array_equal(engine._cache.read([3, 1]), data[::-1])
