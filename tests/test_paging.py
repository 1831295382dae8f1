"""Blocks of the KV cache: shared, evicted, preempted, given back; and the text is always the same."""

import asyncio
import dataclasses
import random
import time

import pytest
import torch

from moe_ray.errors import ConfigError, RequestError
from moe_ray.models.transformer import build_model
from moe_ray.serving.engine.blocks import BlockPool, chain_digest, root_digest
from moe_ray.serving.engine.cache import BLOCK_TOKENS, bytes_per_block
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.scheduler import Scheduler, Sequence
from moe_ray.serving.engine.thread import EngineThread
from tests.engines import MAX_CONTEXT, expected, make_model, make_prompt, make_request, make_tokenizer, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


def make_engine(model, tokenizer, *, blocks=None, max_batch_size=4, **settings):
    """An engine whose cache has this many blocks that texts can use."""
    size = bytes_per_block(model.config, torch.float32)
    budget = None if blocks is None else (blocks + 1) * size
    settings = {"max_context": MAX_CONTEXT, "prefill_tokens": 16, **settings}
    return Engine(model, tokenizer, max_batch_size=max_batch_size, kv_cache_bytes=budget, **settings)


def computed_by(engine, *requests):
    before = engine.stats().computed_tokens
    results = run(engine, *requests)
    return engine.stats().computed_tokens - before, [result[:3] for result in results]


class TestPrefixes:
    @pytest.mark.parametrize(("length", "hit"), [(15, 0), (16, 0), (17, 16), (32, 16), (40, 32), (49, 48)])
    def test_a_known_prompt_is_computed_from_its_last_full_block_on(self, model, tokenizer, length, hit):
        engine = make_engine(model, tokenizer)
        prompt = [3 + i % 200 for i in range(length)]
        first = make_request("first", prompt, max_tokens=3)
        all_tokens, texts = computed_by(engine, first)
        tokens, again = computed_by(engine, make_request("again", prompt, max_tokens=3))
        assert texts == again == [expected(model, tokenizer, first)]
        assert all_tokens - tokens == hit
        assert engine.stats().prefix_hit_tokens == hit
        assert engine.stats().prefix_tokens == 2 * length

    def test_a_block_is_known_only_after_the_same_beginning(self, model, tokenizer):
        engine = make_engine(model, tokenizer)
        same = [7] * 40
        run(engine, make_request("a", [5, *same]))
        other = make_request("b", [6, *same])
        assert run(engine, other)[0][:3] == expected(model, tokenizer, other)
        assert engine.stats().prefix_hit_tokens == 0

    def test_the_next_turn_finds_what_was_generated(self, model, tokenizer):
        engine = make_engine(model, tokenizer)
        prompt = [9 + i for i in range(20)]
        engine.submit(make_request("turn", prompt, max_tokens=30))
        tokens = engine._generations["turn"].sequence.tokens
        while engine.has_work:
            engine.step()
        assert len(tokens) >= 33
        turn = make_request("next", [*tokens[:36], 5, 6], max_tokens=4)
        assert run(engine, turn)[0][:3] == expected(model, tokenizer, turn)
        assert engine.stats().prefix_hit_tokens == 32

    def test_requests_at_the_same_time_share_what_one_computes(self, model, tokenizer):
        engine = make_engine(model, tokenizer, prefill_tokens=64)
        requests = [make_request(f"r{i}", [*range(8, 48), i], max_tokens=1) for i in range(4)]
        tokens, texts = computed_by(engine, *requests)
        assert texts == [expected(model, tokenizer, request) for request in requests]
        assert tokens == 41 + 3 * 9

    def test_under_eviction_texts_stay_the_same(self, model, tokenizer):
        engine, rng = make_engine(model, tokenizer, blocks=7), random.Random(11)
        prefixes = [make_prompt(rng, tokenizer) for _ in range(5)]
        for number in range(40):
            prompt = (rng.choice(prefixes) + make_prompt(rng, tokenizer, 12))[:56]
            request = make_request(f"r{number}", prompt, max_tokens=rng.randint(1, 8))
            assert run(engine, request)[0][:3] == expected(model, tokenizer, request)
        assert 0 < engine.stats().prefix_hit_tokens < engine.stats().prefix_tokens

    def test_what_a_broken_text_computed_reaches_nobody(self, model, tokenizer):
        broken = build_model(model.config.model_copy(update={"tie_embeddings": False}), seed=1).eval()
        sound = broken.embed.weight[63].clone()
        engine = make_engine(broken, tokenizer, blocks=8, max_batch_size=2)
        bad, cancelled = make_request("bad", [63] * 40), make_request("cancelled", [63] * 39)
        with torch.no_grad():
            broken.embed.weight[63] = float("inf")
            assert run(engine, bad)[0][1] == "error"
            engine.submit(cancelled)
            engine.step()
            engine.cancel("cancelled")
            fine = [make_request("short", [5, 6, 7]), make_request("long", [8] * 50)]
            assert all(result[1] != "error" for result in run(engine, *fine))
            broken.embed.weight[63] = sound
        hits = engine.stats().prefix_hit_tokens
        run(engine, make_request("end", [63] * 33))
        # The cancelled one did not end, so nothing was known against its only full block.
        assert engine.stats().prefix_hit_tokens - hits <= BLOCK_TOKENS


class TestPreemption:
    @pytest.mark.parametrize("blocks", [4, 5, 9])
    def test_with_few_blocks_all_finish_with_their_text(self, model, tokenizer, blocks):
        rng = random.Random(12)
        engine = make_engine(model, tokenizer, blocks=blocks, max_batch_size=8)
        requests = [
            make_request(f"r{i}", make_prompt(rng, tokenizer, 20), max_tokens=rng.randint(15, 40))
            for i in range(12)
        ]
        sampled = make_request("sampled", [4] * 9, temperature=1.0, seed=3, max_tokens=40)
        alone = run(make_engine(model, tokenizer), sampled)[0][:3]
        *results, with_others = run(engine, *requests, sampled)
        for request, result in zip(requests, results, strict=True):
            assert result[:3] == expected(model, tokenizer, request), request.id
        assert with_others[:3] == alone
        assert engine.stats().preemptions > 0
        assert engine.stats().generated_tokens == sum(r[2] for r in results) + alone[2]
        assert engine.stats().blocks_used == 0

    def test_what_can_never_fit_is_refused(self, model, tokenizer):
        engine = make_engine(model, tokenizer, blocks=2)
        run(engine, make_request("fits", [5] * 20, max_tokens=13))
        with pytest.raises(RequestError, match=r"serve\.kv_cache_bytes") as caught:
            engine.submit(make_request("large", [5] * 20, max_tokens=14))
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
        assert not engine.has_work

    def test_a_cache_without_room_for_a_text_is_refused(self, model, tokenizer):
        with pytest.raises(ConfigError, match=r"serve\.kv_cache_bytes=\d+ holds no text"):
            make_engine(model, tokenizer, blocks=0)


class TestPriorities:
    def test_a_higher_one_interrupts_a_lower_one_which_then_goes_on(self, model, tokenizer):
        engine = make_engine(model, tokenizer, max_batch_size=1)
        low = make_request("low", [5] * 10, max_tokens=30, temperature=1.0, seed=5)
        alone = run(make_engine(model, tokenizer), low)[0][:3]
        engine.submit(low)
        chunks = [chunk for _ in range(6) for chunk in engine.step()]
        same = make_request("same", [6, 7])
        high = dataclasses.replace(make_request("high", [8, 9]), priority=1)
        engine.submit(same)
        engine.submit(high)
        while engine.has_work:
            chunks += engine.step()
        assert [chunk.request_id for chunk in chunks if chunk.finish_reason] == ["high", "low", "same"]
        for request, text in ((high, expected(model, tokenizer, high)[0]), (low, alone[0])):
            assert "".join(chunk.text for chunk in chunks if chunk.request_id == request.id) == text
        assert engine.stats().preemptions == 1

    def test_first_come_first_served_within_one(self):
        scheduler = make_scheduler(BlockPool(100), max_running=2)
        names = {"a": 0, "b": 1, "c": 0, "d": 1, "e": 2}
        for name, priority in names.items():
            scheduler.add(Sequence(name, [0, 1], priority))
        order = []
        while scheduler.has_work:
            scheduler.advance(scheduler.plan())
            order += [sequence.id for sequence in scheduler.running]
            for sequence in scheduler.running.copy():
                scheduler.remove(sequence)
        assert order == ["e", "b", "d", "a", "c"]

    def test_a_large_one_is_not_passed_by_small_ones_behind_it(self):
        scheduler = make_scheduler(BlockPool(1 + 4), max_running=8)
        running, large, small = Sequence("running", [0] * 3), Sequence("large", [1] * 14), Sequence("small", [2])
        for sequence in (running, large, small):
            scheduler.add(sequence)
        scheduler.advance(scheduler.plan())
        assert scheduler.running == [running]
        scheduler.remove(running)
        scheduler.plan()
        assert scheduler.running[0] is large

    def test_lower_ones_are_left_alone_if_that_would_not_be_enough(self):
        scheduler = make_scheduler(BlockPool(1 + 6), max_running=8)
        for name, priority, length in (("low", 0, 3), ("high", 2, 12), ("middle", 1, 16)):
            scheduler.add(Sequence(name, [priority] * length, priority))
            scheduler.advance(scheduler.plan())
        assert [sequence.id for sequence in scheduler.running] == ["high", "low"]


class TestDeadlines:
    def test_waiting_and_running_requests_end_with_it(self, model, tokenizer):
        now = [0.0]
        engine = make_engine(model, tokenizer, max_batch_size=1, clock=lambda: now[0])
        running = dataclasses.replace(make_request("running", [5], max_tokens=50), deadline=2.0)
        waiting = dataclasses.replace(make_request("waiting", [6]), deadline=1.0)
        patient = make_request("patient", [7, 8])
        for request in (running, waiting, patient):
            engine.submit(request)
        assert not any(chunk.finish_reason for chunk in engine.step())
        now[0] = 1.0
        assert [(c.request_id, c.finish_reason, c.num_tokens) for c in engine.step() if c.finish_reason] == [
            ("waiting", "deadline", 0)
        ]
        now[0] = 2.5
        ended = [chunk for chunk in engine.step() if chunk.finish_reason]
        assert [(c.request_id, c.finish_reason, c.num_tokens) for c in ended] == [("running", "deadline", 2)]
        text = ""
        while engine.has_work:
            text += "".join(chunk.text for chunk in engine.step())
        assert text == expected(model, tokenizer, patient)[0]
        assert engine.stats().missed_deadlines == 2
        assert engine.stats().blocks_used == 0

    def test_a_reader_gets_an_error_that_says_so(self, model, tokenizer):
        thread = EngineThread(make_engine(model, tokenizer), max_unfinished=2)

        async def read():
            late = dataclasses.replace(make_request("late", [5]), deadline=time.monotonic() - 1)
            async for _ in thread.submit([late]):
                pass

        try:
            with pytest.raises(RequestError, match="deadline") as caught:
                asyncio.run(read())
            assert thread.stats().missed_deadlines == 1
        finally:
            thread.stop()
        assert (caught.value.status, caught.value.code) == (504, "deadline_exceeded")


def make_scheduler(pool, max_running=4, prefill_tokens=16, max_blocks=64):
    return Scheduler(
        pool, block_tokens=4, max_running=max_running, max_blocks=max_blocks, prefill_tokens=prefill_tokens
    )


def check_scheduler(scheduler, pool, spans):
    pool.check()
    # A text that goes on pauses for as long as a step takes.
    pauses = any(count == 1 and start + 1 == len(sequence.tokens) for sequence, start, count in spans)
    assert sum(count for _, _, count in spans if count > 1) <= (16 if pauses else 64)
    assert [span.count > 1 for span in spans] == sorted(span.count > 1 for span in spans)
    for sequence, start, count in spans:
        assert start == sequence.cached
        assert len(sequence.blocks) * 4 >= start + count
    for sequence in scheduler.running:
        assert list(scheduler.tables_RM[sequence.row, : len(sequence.blocks)]) == sequence.blocks
    ranks = [sequence.rank for sequence in scheduler.running]
    assert ranks == sorted(ranks)
    # A block that is being written to belongs to one sequence.
    writing = [s.blocks[p // 4] for s, start, count in spans for p in range(start, start + count, 4)]
    assert len(writing) == len(set(writing))


class TestNothingIsLost:
    @pytest.mark.parametrize("seed", range(4))
    def test_no_block_after_thousands_of_submits_and_cancels(self, seed):
        rng, pool = random.Random(seed), BlockPool(1 + 20)
        scheduler, live, content = make_scheduler(pool, max_running=6), [], {}
        for number in range(1500):
            if rng.random() < 0.6 and len(live) < 15:
                prompt = [rng.randrange(2)] * rng.randint(1, 30) + [rng.randrange(3) for _ in range(9)]
                live.append(Sequence(str(number), prompt, rng.choice([0, 0, 1])))
                scheduler.add(live[-1])
            spans = scheduler.plan()
            check_scheduler(scheduler, pool, spans)
            assert spans or not live
            for sequence, start, count in spans:
                # What a sequence reads is what was written for these tokens.
                for position in range(start):
                    block = sequence.blocks[position // 4]
                    assert content[block, position % 4] == sequence.tokens[: position + 1]
                for position in range(start, start + count):
                    content[sequence.blocks[position // 4], position % 4] = sequence.tokens[: position + 1]
            for index in scheduler.advance(spans):
                spans[index].sequence.tokens.append(rng.randrange(3))
            for sequence in [s for s in live if rng.random() < 0.05 or len(s.tokens) > 70]:
                live.remove(sequence)
                scheduler.remove(sequence, is_broken=rng.random() < 0.2)
        for sequence in live:
            scheduler.remove(sequence)
        pool.check()
        assert pool.num_free == pool.num_blocks
        assert scheduler.preemptions > 10
        assert scheduler.prefix_hit_tokens > 100
        assert not scheduler._computing

    def test_no_block_of_an_engine(self, model, tokenizer):
        rng, engine = random.Random(13), make_engine(model, tokenizer, blocks=9)
        names = []
        for number in range(120):
            names.append(f"r{number}")
            engine.submit(make_request(names[-1], make_prompt(rng, tokenizer), max_tokens=rng.randint(1, 9)))
            engine.step()
            if rng.random() < 0.3:
                engine.cancel(rng.choice(names))
        while engine.has_work:
            engine.step()
        stats = engine.stats()
        assert (stats.waiting, stats.running, stats.queued_tokens, stats.blocks_used) == (0, 0, 0, 0)
        assert stats.blocks_total == 9
        assert not engine._generations


def test_digests_depend_on_all_before_and_on_the_model():
    root = root_digest("a model")
    first = chain_digest(root, [1, 2])
    assert len({root, first, chain_digest(root, [1, 3]), chain_digest(first, [1, 2]), root_digest("another")}) == 5
