"""Tiers below the KV cache: prefixes come back from memory and disk, and no damage or full disk changes a text."""

import os
import random

import numpy as np
import pytest
import torch

from moe_ray.serving.engine.cache import bytes_per_block
from moe_ray.serving.engine.disk_tier import DiskTier
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.tier_store import Tiering
from tests.engines import MAX_CONTEXT, expected, make_model, make_request, make_tokenizer, run

pytestmark = pytest.mark.usefixtures("one_thread")
BIG = 1 << 24


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
        budget = 6 * bytes_per_block(model.config, torch.float32)
        engine = Engine(
            model,
            tokenizer,
            max_batch_size=2,
            max_context=MAX_CONTEXT,
            kv_cache_bytes=budget,
            tiering=tiering,
            identity=identity,
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


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

    @pytest.mark.parametrize("damage", ["flip", "cut", "empty", "directory"])
    def test_damaged_files_are_misses(self, make_engine, model, tokenizer, tmp_path, damage):
        requests = make_turns(4)
        writer = make_engine(Tiering(0, tmp_path, BIG))
        check_texts(writer, model, tokenizer, requests)
        writer.close()
        for path in tmp_path.iterdir():
            content = path.read_bytes()
            if damage == "directory":
                path.unlink()
                path.mkdir()
                continue
            flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
            path.write_bytes({"flip": flipped, "cut": content[: len(content) // 2], "empty": b""}[damage])
        engine = make_engine(Tiering(0, tmp_path, BIG))
        assert check_texts(engine, model, tokenizer, requests) == 0
        assert engine.stats().tier_damaged + engine.stats().tier_errors >= 5

    def test_a_disk_that_refuses_everything(self, make_engine, model, tokenizer, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        engine, requests = make_engine(Tiering(0, tmp_path / "file" / "tier", BIG)), make_turns(5)
        check_texts(engine, model, tokenizer, requests)
        assert check_texts(engine, model, tokenizer, requests) == 0
        assert engine.stats().tier_errors > 0

    def test_a_full_disk(self, monkeypatch, tmp_path):
        tier = DiskTier(tmp_path, BIG)
        tier.put(b"before", b"kept")
        # /dev/full answers every write with ENOSPC.
        monkeypatch.setattr("moe_ray.serving.engine.disk_tier._open_private", open_full)
        tier.put(b"after", b"x" * 100_000)
        assert tier.errors == 1
        assert (tier.get(b"before"), tier.get(b"after")) == (b"kept", None)
        assert [path.name for path in tmp_path.iterdir()] == [f"{b'before'.hex()}.tier"]

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


def open_full(path, flags):
    os.close(os.open(path, flags, 0o600))
    return os.open("/dev/full", os.O_WRONLY)


def test_blocks_of_every_type_are_read_as_they_were_written(make_engine):
    engine = make_engine(None)
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, engine._cache.read([1, 3]).shape, dtype=np.uint8)
    engine._cache.write([1, 3], data)
    np.testing.assert_array_equal(engine._cache.read([3, 1]), data[::-1])
