"""The generation engine: the same tokens as a plain forward pass, whatever shares the batch."""

import asyncio
import itertools
import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moe_ray.errors import RequestError
from moe_ray.models.transformer import build_model
from moe_ray.serving.engine.adjust import adjust
from moe_ray.serving.engine.detokenizer import Detokenizer, StopFilter
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.request import Request, SamplingParams
from moe_ray.serving.engine.sampler import Row, sample
from moe_ray.serving.engine.thread import EngineThread
from tests.engines import MAX_CONTEXT, expected, greedy, make_model, make_prompt, make_request, make_tokenizer, run

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer, max_batch_size=4, max_context=MAX_CONTEXT, prefill_tokens=16)


class TestSameTokens:
    def test_alone(self, engine, model, tokenizer):
        rng = random.Random(0)
        for i in range(4):
            request = make_request(f"r{i}", make_prompt(rng, tokenizer), max_tokens=20)
            assert run(engine, request)[0][:3] == expected(model, tokenizer, request)

    def test_with_strangers_that_join_and_leave_at_random(self, engine, model, tokenizer):
        rng = random.Random(1)
        requests = [
            make_request(f"r{i}", make_prompt(rng, tokenizer), max_tokens=rng.randint(1, 20)) for i in range(24)
        ]
        cancelled = {f"r{i}" for i in range(0, 24, 5)}
        waiting, texts, ends, most_active = list(requests), {}, {}, 0
        while waiting or engine.has_work:
            for _ in range(rng.choice([0, 0, 1, 3])):
                if waiting:
                    engine.submit(waiting.pop(0))
            for chunk in engine.step():
                texts[chunk.request_id] = texts.get(chunk.request_id, "") + chunk.text
                ends[chunk.request_id] = (chunk.finish_reason, chunk.num_tokens)
            most_active = max(most_active, len(engine._scheduler.running))
            for name in cancelled:
                if rng.random() < 0.2:
                    engine.cancel(name)
        assert most_active == 4
        kept = [request for request in requests if request.id not in cancelled]
        for request in kept:
            assert (texts[request.id], *ends[request.id]) == expected(model, tokenizer, request), request.id

    @pytest.mark.parametrize("prefill_tokens", [1, 7, 40, 1000])
    def test_however_prompts_are_cut(self, model, tokenizer, prefill_tokens):
        engine = Engine(model, tokenizer, max_batch_size=3, max_context=MAX_CONTEXT, prefill_tokens=prefill_tokens)
        rng = random.Random(2)
        requests = [make_request(f"r{i}", make_prompt(rng, tokenizer)) for i in range(5)]
        for request, result in zip(requests, run(engine, *requests), strict=True):
            assert result[:3] == expected(model, tokenizer, request)

    def test_long_prompt_does_not_stop_running_texts(self, engine, tokenizer):
        engine.submit(make_request("running", [5], max_tokens=40))
        engine.step()
        engine.submit(make_request("long", [7] * 48))
        sequence = engine._generations["running"].sequence
        for step in range(3):
            before = len(sequence.tokens)
            engine.step()
            assert len(sequence.tokens) == before + 1
            assert engine._scheduler.running[1].cached == 16 * (step + 1)

    def test_up_to_the_whole_context(self, engine, model, tokenizer):
        request = make_request("full", [3] * 10, max_tokens=MAX_CONTEXT - 10)
        assert run(engine, request)[0][:3] == expected(model, tokenizer, request)

    def test_end_of_text_token_stops(self, model, tokenizer):
        tokens = greedy(model, tokenizer, [5, 6], 12)
        length = next(i for i in range(4, 12) if tokens[i] not in tokens[:i])
        ending = SimpleNamespace(
            eos_id=tokens[length],
            stop_ids=frozenset({tokens[length]}),
            vocab_size=tokenizer.vocab_size,
            decode=tokenizer.decode,
        )
        engine = Engine(model, ending, max_batch_size=1, max_context=MAX_CONTEXT)
        request = make_request("r", [5, 6], max_tokens=12)
        assert run(engine, request)[0][:3] == (tokenizer.decode(tokens[:length]), "stop", length + 1)

    def test_bfloat16_runs(self, model, tokenizer):
        half = build_model(model.config, seed=1).to(torch.bfloat16).eval()
        engine = Engine(half, tokenizer, max_batch_size=2, max_context=MAX_CONTEXT)
        assert all(
            result[1] in ("stop", "length") for result in run(engine, *[make_request(n, [4, 5]) for n in "ab"])
        )

    def test_a_broken_text_leaves_nothing_behind(self, tokenizer, model):
        broken = build_model(model.config.model_copy(update={"tie_embeddings": False}), seed=1).eval()
        with torch.no_grad():
            broken.embed.weight[63] = float("inf")
        engine = Engine(broken, tokenizer, max_batch_size=2, max_context=MAX_CONTEXT)
        assert run(engine, make_request("bad", [5] * 40 + [63]))[0][1] == "error"
        # The first takes the slot of the broken one, the second is as long: the first is masked up to its length.
        rest = [make_request("short", [5, 6, 7]), make_request("long", [8] * 50)]
        assert all(result[1] != "error" for result in run(engine, *rest))

    def test_only_sampled_positions_get_logits(self, model, tokenizer, monkeypatch):
        rows = []
        logits = model.logits
        engine = Engine(model, tokenizer, max_batch_size=4, max_context=64, runner="torch")
        monkeypatch.setattr(model, "logits", lambda hidden: rows.append(hidden.shape[0]) or logits(hidden))
        run(engine, make_request("a", [3] * 30, max_tokens=2))
        assert rows == [1, 1]


class TestSampling:
    def test_same_seed_same_text_whatever_is_in_the_batch(self, engine, tokenizer):
        rng = random.Random(3)
        request = make_request("x", make_prompt(rng, tokenizer), temperature=1.0, top_p=0.9, seed=7, max_tokens=16)
        alone = run(engine, request)[0][:3]
        strangers = [
            make_request(f"s{i}", make_prompt(rng, tokenizer), temperature=i / 4, top_k=i * 3) for i in range(6)
        ]
        assert run(engine, *strangers[:2], request, *strangers[2:])[2][:3] == alone
        other = Request("y", request.prompt_ids, SamplingParams(seed=8, max_tokens=16))
        assert run(engine, other)[0][0] != alone[0]

    def test_frequencies_follow_temperature_top_k_and_top_p(self):
        probs = torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05])
        logits_BV = probs.log().expand(1500, 5)
        for params, kept in (
            (SamplingParams(), probs),
            (SamplingParams(temperature=2.0), probs**0.5),
            (SamplingParams(top_k=2), torch.tensor([0.4, 0.3, 0, 0, 0])),
            (SamplingParams(top_p=0.75), torch.tensor([0.4, 0.3, 0.2, 0, 0])),
            (SamplingParams(top_k=3, top_p=0.7), torch.tensor([0.4, 0.3, 0, 0, 0])),
            (SamplingParams(top_k=10**30), probs),
            (SamplingParams(top_p=1e-9), torch.tensor([1.0, 0, 0, 0, 0])),
            (SamplingParams(temperature=1e-300), torch.tensor([1.0, 0, 0, 0, 0])),
        ):
            choices = sample(logits_BV, [Row(replace(params, seed=seed)) for seed in range(1500)])
            counts = torch.bincount(torch.tensor([choice.token_id for choice in choices]), minlength=5)
            torch.testing.assert_close(counts / 1500, kept / kept.sum(), atol=0.04, rtol=0)
            assert not counts[kept == 0].any()

    def test_top_p_beyond_the_first_candidates(self):
        logits_BV = torch.zeros(1, 3000)
        drawn = {sample(logits_BV, [Row(SamplingParams(top_p=0.99, seed=s))])[0].token_id for s in range(50)}
        assert len(drawn) > 40

    def test_rows_do_not_see_each_other(self):
        torch.manual_seed(0)
        logits_BV = torch.randn(8, 500)
        params = [
            SamplingParams(temperature=0),
            SamplingParams(seed=1),
            SamplingParams(seed=2, top_p=0.5, logprobs=2),
            SamplingParams(seed=3, top_k=300),
            SamplingParams(seed=4, temperature=0.3, logprobs=0),
            SamplingParams(seed=-5, top_k=3, top_p=0.9),
            SamplingParams(seed=6, min_p=0.2, presence_penalty=1.5, frequency_penalty=-0.5),
            SamplingParams(seed=7, repetition_penalty=1.3, logit_bias=((3, 4.0), (5, -2.0))),
        ]
        together = sample(logits_BV, [Row(p) for p in params])
        alone = [sample(logits_BV[i : i + 1], [Row(p)])[0] for i, p in enumerate(params)]
        assert together == alone

    def test_penalties_and_biases_by_the_numbers(self):
        params = SamplingParams(
            presence_penalty=0.5,
            frequency_penalty=0.25,
            repetition_penalty=2.0,
            logit_bias=((3, 1.5), (0, -1.0)),
        )
        row = Row(params, prompt_ids=(1, 4))
        logits_BV = torch.tensor([[1.0, 2.0, 3.0, -4.0, -5.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
        first_BV = adjust(logits_BV, [row.adjustments, None])
        torch.testing.assert_close(first_BV[0], torch.tensor([0.0, 1.0, 3.0, -2.5, -10.0]))
        for token in (2, 2, 3):
            assert row.accept(token)
        second_BV = adjust(logits_BV, [row.adjustments, None])
        torch.testing.assert_close(second_BV[0], torch.tensor([0.0, 1.0, 0.5, -7.25, -10.0]))
        assert torch.equal(second_BV[1], logits_BV[1])
        assert adjust(logits_BV, [None, None]) is logits_BV

    def test_logprobs_are_of_the_raw_logits(self):
        logits_BV = torch.tensor([[1.0, 3.0, 2.0]])
        choice = sample(logits_BV, [Row(SamplingParams(temperature=0, logprobs=2))])[0]
        reference = logits_BV[0].log_softmax(0)
        assert choice.logprob.chosen == pytest.approx(float(reference[1]))
        assert [token for token, _ in choice.logprob.top] == [1, 2]
        assert choice.logprob.top[1][1] == pytest.approx(float(reference[2]))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize(
        "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(top_p=0.5, top_k=2, logprobs=1)]
    )
    def test_broken_logits_end_their_own_row_only(self, bad, params):
        logits_BV = torch.tensor([[0.0, bad, 1.0], [0.0, 9e9, 0.0]])
        broken, fine = sample(logits_BV, [Row(params), Row(params)])
        assert broken.token_id is None
        assert fine.token_id == 1

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("temperature", float("nan")),
            ("temperature", -0.1),
            ("temperature", 2.1),
            ("top_p", 0.0),
            ("top_p", float("nan")),
            ("top_k", -1),
            ("max_tokens", 0),
            ("max_tokens", -(10**400)),
            ("seed", 2**63),
            ("logprobs", 21),
            ("min_p", 1.1),
            ("presence_penalty", float("inf")),
            ("frequency_penalty", -2.1),
            ("repetition_penalty", 0.0),
            ("logit_bias", ((1, 101.0),)),
            ("logit_bias", ((1, 0.0),) * 1025),
            ("stop", ("",)),
            ("stop", ("a",) * 5),
            ("stop", ("a" * 1001,)),
        ],
    )
    def test_bad_parameters_are_named(self, name, value):
        with pytest.raises(RequestError, match="Fix: use ") as caught:
            SamplingParams(**{name: value})
        assert (caught.value.param, caught.value.status) == (name, 400)


class TestRequests:
    @pytest.mark.parametrize(
        ("prompt", "max_tokens", "param", "code"),
        [
            ((), 1, "prompt", None),
            ((-1,), 1, "prompt", None),
            ((10**30,), 1, "prompt", None),
            ((1,) * 60, 5, "max_tokens", "context_length_exceeded"),
            ((1,) * 64, 1, "prompt", "context_length_exceeded"),
            ((1,), 10**30, "max_tokens", "context_length_exceeded"),
        ],
    )
    def test_impossible_ones_are_refused(self, engine, prompt, max_tokens, param, code):
        with pytest.raises(RequestError) as caught:
            engine.submit(make_request("r", prompt, max_tokens=max_tokens))
        assert (caught.value.param, caught.value.code, caught.value.status) == (param, code, 400)
        assert not engine.has_work

    def test_rows_of_the_model_without_a_token_are_never_used(self, engine, tokenizer):
        with pytest.raises(RequestError, match=f"from 0 to {tokenizer.vocab_size - 1}"):
            engine.submit(make_request("r", [tokenizer.vocab_size]))

    def test_the_tokens_of_one_that_is_late_are_told_before_its_end(self, model, tokenizer):
        now = [0.0]
        engine = Engine(model, tokenizer, max_batch_size=4, max_context=MAX_CONTEXT, clock=lambda: now[0])
        request = make_request("late", [5], max_tokens=40, ignore_eos=True)
        engine.submit(replace(request, deadline=1.0, piece_tokens=32))
        assert [engine.step() for _ in range(9)] == [[]] * 9
        now[0] = 1.0
        assert [(chunk.num_tokens, chunk.finish_reason) for chunk in engine.step()] == [(9, None), (9, "deadline")]
        assert not engine.has_work


class TestText:
    def test_pieces_make_up_the_text_of_any_tokens(self, tokenizer):
        rng = random.Random(5)
        for _ in range(200):
            ids = make_prompt(rng, tokenizer, longest=150)
            detokenizer = Detokenizer(tokenizer, [])
            pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
            assert "".join(pieces) == tokenizer.decode(ids)

    def test_characters_are_never_cut(self, tokenizer):
        text = "naïve 東京 🙂🙂 ok"
        detokenizer = Detokenizer(tokenizer, [])
        pieces = [detokenizer.push(token) for token in tokenizer.encode(text)]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)

    def test_incomplete_character_comes_out_at_the_end(self, tokenizer):
        first_bytes = tokenizer.encode("🙂")[:-1]
        detokenizer = Detokenizer(tokenizer, tokenizer.encode("hi")[-1:])
        assert "".join(detokenizer.push(token) for token in first_bytes) == ""
        assert detokenizer.flush() == "\ufffd"

    def test_prompt_that_ends_within_a_character(self, tokenizer):
        ids = tokenizer.encode("🙂 yes")
        detokenizer = Detokenizer(tokenizer, ids[:1])
        text = "".join(detokenizer.push(token) for token in ids[1:]) + detokenizer.flush()
        assert text.endswith(" yes")

    @pytest.mark.parametrize("size", [1, 2, 3, 50])
    @pytest.mark.parametrize(
        ("stops", "text", "kept", "stopped"),
        [
            (("END",), "abc ENEND xyz", "abc EN", True),
            (("END", "c E"), "abc END", "ab", True),
            (("aab",), "aaab", "a", True),
            (("END",), "abc EN", "abc EN", False),
            ((), "abc", "abc", False),
        ],
    )
    def test_stop_strings_however_the_text_is_cut(self, size, stops, text, kept, stopped):
        stop_filter = StopFilter(stops)
        out = ""
        for start in range(0, len(text), size):
            out += stop_filter.push(text[start : start + size])
            assert kept.startswith(out)
            if stop_filter.stopped:
                break
        assert out + stop_filter.flush() == kept
        assert stop_filter.stopped == stopped

    def test_stop_string_ends_generation_and_is_left_out(self, engine, model, tokenizer):
        rng = random.Random(6)
        while True:
            request = make_request("free", make_prompt(rng, tokenizer), max_tokens=20, logprobs=1)
            text, _, _, chunks = run(engine, request)[0]
            if len(text) > 8 and text[3:6] not in text[:5] and text.isprintable():
                break
        stopped = make_request("stop", request.prompt_ids, max_tokens=20, stop=(text[3:6],), logprobs=1)
        cut, reason, num_tokens, cut_chunks = run(engine, stopped)[0]
        assert (cut, reason) == (text[:3], "stop")
        # The second finds most of its prompt in the cache, so sums are not those of the first to the last bit.
        logprobs = [(lp.token_id, pytest.approx(lp.logprob)) for chunk in cut_chunks for lp in chunk.logprobs]
        whole = [(lp.token_id, lp.logprob) for chunk in chunks for lp in chunk.logprobs if lp.text_offset < 3]
        assert whole == logprobs
        assert num_tokens < 20

    def test_logprobs_cover_every_token(self, engine, model, tokenizer):
        request = make_request("lp", [9, 10], max_tokens=12, logprobs=3)
        _, _, num_tokens, chunks = run(engine, request)[0]
        logprobs = [lp for chunk in chunks for lp in chunk.logprobs]
        tokens = greedy(model, tokenizer, [9, 10], 12)
        assert [lp.token_id for lp in logprobs] == [token for token in tokens if token != tokenizer.eos_id]
        assert num_tokens == len(tokens)
        assert all(len(lp.top) == 3 and lp.top[0] == (lp.token_id, lp.logprob) for lp in logprobs)


@pytest.fixture
def thread(engine):
    thread = EngineThread(engine, max_unfinished=6)
    yield thread
    thread.stop()


async def collect(stream):
    texts = {}
    async for index, chunk in stream:
        texts[index] = texts.get(index, "") + chunk.text
    return texts


class TestThread:
    def test_concurrent_streams(self, thread, model, tokenizer):
        rng = random.Random(8)
        requests = [make_request(f"r{i}", make_prompt(rng, tokenizer)) for i in range(6)]

        async def main():
            groups = [requests[:1], requests[1:4], requests[4:]]
            return await asyncio.gather(*[collect(thread.submit(group)) for group in groups])

        one, three, two = asyncio.run(main())
        texts = [*one.values(), *(three[i] for i in range(3)), *(two[i] for i in range(2))]
        assert texts == [expected(model, tokenizer, request)[0] for request in requests]

    def test_too_many_requests_are_refused_whole(self, thread):
        async def main():
            async with thread.submit([make_request(f"a{i}", [5], max_tokens=60) for i in range(5)]):
                with pytest.raises(RequestError) as caught:
                    thread.submit([make_request(f"b{i}", [5]) for i in range(2)])
                assert caught.value.status == 503
                await collect(thread.submit([make_request("c", [5])]))

        asyncio.run(main())

    def test_leaving_a_stream_frees_its_slots(self, thread, engine, monkeypatch):
        allowed, done, step = threading.Semaphore(0), threading.Semaphore(0), engine.step

        def step_when_allowed():
            assert not engine.has_work or allowed.acquire(timeout=5)
            chunks = step()
            done.release()
            return chunks

        monkeypatch.setattr(engine, "step", step_when_allowed)

        async def main():
            async with thread.submit([make_request(f"r{i}", [5], max_tokens=60) for i in range(6)]):
                allowed.release()
                assert await asyncio.to_thread(done.acquire, timeout=5)
                assert len(engine._scheduler.running) == 4
            # One more step may have begun before the requests were dropped, but no third.
            allowed.release()
            async with asyncio.timeout(5):
                while engine.has_work or thread._streams:
                    await asyncio.sleep(0)

        asyncio.run(main())
        assert not engine._generations
        assert thread.is_alive

    def test_calls_run_one_by_one_between_steps(self, thread, engine, monkeypatch):
        order, step = [], engine.step

        def noted_step():
            order.append("step")
            return step()

        monkeypatch.setattr(engine, "step", noted_step)

        def look(name):
            assert threading.current_thread().name == "engine"
            order.append(name)
            return name

        async def main():
            async with thread.submit([make_request("r", [5], max_tokens=50)]) as stream:
                names = await asyncio.gather(*[thread.call(lambda n=name: look(n)) for name in "abcd"])
                assert names == list("abcd")
                return await collect(stream)

        assert asyncio.run(main())
        places = [order.index(name) for name in "abcd"]
        assert all("step" in order[first:second] for first, second in itertools.pairwise(places))

    def test_failure_of_a_call_is_its_own(self, thread):
        async def main():
            with pytest.raises(ZeroDivisionError):
                await thread.call(lambda: 1 / 0)
            assert await thread.call(lambda: 5) == 5
            thread.stop()
            with pytest.raises(RequestError) as caught:
                await thread.call(lambda: 5)
            assert caught.value.status == 503

        asyncio.run(main())

    def test_too_many_calls_are_refused_and_stopping_ends_those_that_wait(self, thread):
        begun, go = threading.Event(), threading.Event()

        def block():
            begun.set()
            assert go.wait(10)

        async def main():
            running = asyncio.ensure_future(thread.call(block))
            assert await asyncio.to_thread(begun.wait, 10)
            waiting = [asyncio.ensure_future(thread.call(lambda: 1)) for _ in range(7)]
            with pytest.raises(RequestError, match="6 requests are waiting"):
                await waiting[6]
            stopping = asyncio.ensure_future(asyncio.to_thread(thread.stop))
            while thread.is_alive:
                await asyncio.sleep(0)
            go.set()
            await asyncio.gather(running, stopping)
            return await asyncio.gather(*waiting[:6], return_exceptions=True)

        assert [error.status for error in asyncio.run(main())] == [503] * 6

    def test_engine_failure_reaches_every_request_and_health(self, thread, engine, monkeypatch):
        reached, fail = threading.Event(), threading.Event()

        def broken_step():
            reached.set()
            fail.wait(10)
            raise RuntimeError("boom")

        monkeypatch.setattr(engine, "step", broken_step)

        async def main():
            streams = [thread.submit([make_request(f"r{i}", [5], max_tokens=60)]) for i in range(5)]
            await asyncio.to_thread(reached.wait, 10)
            fail.set()
            return await asyncio.gather(*map(collect, streams), return_exceptions=True)

        errors = asyncio.run(main())
        assert [error.status for error in errors] == [503] * 5
        assert not thread.is_alive
        with pytest.raises(RequestError, match="stopped"):
            asyncio.run(collect_one(thread))

    def test_broken_weights_end_the_request_and_not_the_engine(self, thread, model):
        weight = model.norm.weight.data
        before = weight.clone()
        weight.fill_(float("nan"))
        try:
            with pytest.raises(RequestError, match="not finite") as caught:
                asyncio.run(collect_one(thread))
        finally:
            weight.copy_(before)
        assert caught.value.status == 500
        assert thread.is_alive
        assert asyncio.run(collect_one(thread))

    def test_closed_event_loop_does_not_kill_the_engine(self, thread, engine):
        async def abandon():
            thread.submit([make_request("gone", [5], max_tokens=60)])

        asyncio.run(abandon())
        assert asyncio.run(collect_one(thread))
        assert thread.is_alive


async def collect_one(thread):
    return await collect(thread.submit([make_request("one", [5])]))
