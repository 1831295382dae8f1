"""The C++ forward pass gives what torch gives, for every architecture it knows and every type of weight."""

import os
import random
import stat
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError
from moe_ray.models.quantize import QuantizedExperts, dequantize, quantize, quantize_experts
from moe_ray.models.transformer import build_model
from moe_ray.native.matrix import as_matrix, multiply
from moe_ray.serving.engine.cache import BLOCK_TOKENS, KVCache, blocks_of
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.layout import Layout
from moe_ray.serving.engine.make_runner import make_runner
from moe_ray.serving.engine.native_runner import NativeRunner
from moe_ray.serving.engine.runner import TorchRunner
from tests.engines import expected, greedy, make_model, make_prompt, make_request, make_tokenizer, run

BASE = {
    "vocab_size": 131,
    "dim": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_experts": 8,
    "top_k": 2,
    "expert_dim": 96,
    "max_sequence_length": 320,
    "init_std": 0.2,
}
VARIANTS = {
    "plain": {},
    "one_head_each": {"num_kv_heads": 4, "top_k": 1},
    "window_and_biases": {
        "sliding_window": 5,
        "attention_bias": True,
        "expert_ffn_bias": True,
        "router_bias": True,
    },
    "sinks": {
        "attention_sinks": True,
        "activation": "swigluoai",
        "softmax_after_top_k": True,
        "sliding_window": 9,
    },
    "head_norm": {"qk_norm": "head", "route_norm": True, "head_dim": 24},
    "full_norm_and_clip": {"qk_norm": "full", "clip_qkv": 0.5},
    "groups": {
        "score_func": "sigmoid",
        "expert_bias": True,
        "num_expert_groups": 4,
        "num_limited_groups": 2,
        "route_scale": 2.5,
        "route_norm": True,
        "num_shared_experts": 2,
        "shared_expert_gate": True,
        "num_dense_layers": 1,
        "dense_dim": 80,
    },
    "odd_widths": {"dim": 56, "num_heads": 2, "num_kv_heads": 1, "head_dim": 26, "expert_dim": 40},
    "geglu": {"activation": "geglu", "num_shared_experts": 1},
    "gelu": {"activation": "gelu", "num_dense_layers": 1, "dense_dim": 70},
    "relu": {"activation": "relu", "tie_embeddings": True},
    "relu2": {"activation": "relu2"},
}


def build(variant, dtype=torch.float32):
    model = build_model(ModelConfig(**{**BASE, **VARIANTS[variant]}), seed=3).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.ndim == 1 and tensor.is_floating_point() and "load_fraction" not in name:
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
    for name, parameter in model.named_parameters():
        if "router" not in name:
            parameter.data = parameter.data.to(dtype)
    return model


def make_layout_of(spans, tables):
    """Spans as (sequence, first position, count); there is no block where their tables go on."""
    tables_RM = np.array(tables, dtype=np.int32)
    for row, first, count in spans:
        tables_RM[row, blocks_of(first + count) :] = 2**31 - 1
    return Layout(np.array(spans, dtype=np.int64), tables_RM, BLOCK_TOKENS)


def passes(config):
    """Prompts of three sequences in chunks, some of them while others decode."""
    tables = [[3, 7, 1], [2, 9, 4], [5, 6, 8]]
    generator = torch.Generator().manual_seed(0)
    plans = [
        [(0, 0, 20)],
        [(0, 20, 1), (1, 0, 13)],
        [
            (0, 21, 1),
            (1, 13, 1),
            (2, 0, 5),
        ],
    ]
    plans += [[(0, 22 + i, 1), (1, 14 + i, 1), (2, 5 + i, 1)] for i in range(20)]
    for spans in plans:
        count = sum(span[2] for span in spans)
        tokens_T = torch.randint(config.vocab_size, (count,), generator=generator).numpy()
        yield tokens_T, make_layout_of(spans, tables)


def both(model):
    """Hidden states and logits of each pass by torch and by the native code."""
    runners = []
    for make in (TorchRunner, NativeRunner):
        cache = KVCache(model.config, 10, BLOCK_TOKENS, model.embed.weight.dtype, torch.device("cpu"))
        runners.append((make(model, cache), cache))
    with torch.inference_mode():
        for tokens_T, layout in passes(model.config):
            found = []
            for runner, _ in runners:
                hidden_TD = runner.forward(tokens_T, layout)
                found.append((hidden_TD.float(), runner.logits(hidden_TD)))
            yield found
    (_, cache), (_, native_cache) = runners
    yield [
        (
            torch.cat([k.flatten() for k, _ in c.layers]).float(),
            torch.cat([v.flatten() for _, v in c.layers]).float(),
        )
        for c in (cache, native_cache)
    ]


class TestForward:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_is_that_of_torch(self, variant):
        for (hidden, logits), (native_hidden, native_logits) in both(build(variant)):
            torch.testing.assert_close(native_hidden, hidden, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(native_logits, logits, rtol=1e-4, atol=3e-4)

    @pytest.mark.parametrize("variant", ["plain", "groups"])
    def test_in_bfloat16_rounds_less(self, variant):
        exact = [logits for (_, logits), _ in both(build(variant))]
        errors = [0.0, 0.0]
        for true, found in zip(exact, both(build(variant, torch.bfloat16)), strict=True):
            for index, (_, logits) in enumerate(found):
                errors[index] += float((logits - true).square().mean())
        assert errors[1] < errors[0]
        assert errors[1] > 0

    @pytest.mark.parametrize("scheme", ["int8", "int4"])
    @pytest.mark.parametrize("variant", ["plain", "window_and_biases", "relu2"])
    def test_of_quantized_experts_is_that_of_torch(self, variant, scheme):
        model = build(variant)
        quantize_experts(model, scheme)
        for (hidden, logits), (native_hidden, native_logits) in both(model):
            torch.testing.assert_close(native_hidden, hidden, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(native_logits, logits, rtol=1e-4, atol=3e-4)

    def test_with_one_thread_is_that_with_two(self):
        model, threads = build("groups"), torch.get_num_threads()
        results = []
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append([native for _, native in both(model)])
        finally:
            torch.set_num_threads(threads)
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("variant", "scheme"), [*((v, None) for v in VARIANTS), ("plain", "int8"), ("relu2", "int4")]
    )
    @pytest.mark.parametrize("count", [30, 100, 300])
    def test_of_many_tokens_is_that_of_torch(self, variant, scheme, count):
        model, logits = build(variant), []
        if scheme is not None:
            quantize_experts(model, scheme)
        tokens_T = torch.randint(131, (count,), generator=torch.Generator().manual_seed(2)).numpy()
        blocks = list(range(1, 21))
        for make in (TorchRunner, NativeRunner):
            cache = KVCache(model.config, 21, BLOCK_TOKENS, torch.float32, torch.device("cpu"))
            with torch.inference_mode():
                runner = make(model, cache)
                hidden_TD = runner.forward(tokens_T, make_layout_of([(0, 0, count)], [blocks]))
                logits.append(runner.logits(hidden_TD))
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=3e-4)

    def test_of_many_tokens_in_bfloat16_rounds_as_torch_does(self):
        logits = []
        for dtype, make in (
            (torch.float32, TorchRunner),
            (torch.bfloat16, TorchRunner),
            (torch.bfloat16, NativeRunner),
        ):
            model = build("plain", dtype)
            cache = KVCache(model.config, 10, BLOCK_TOKENS, dtype, torch.device("cpu"))
            with torch.inference_mode():
                runner, layout = make(model, cache), make_layout_of([(0, 0, 100)], [[1, 2, 3, 4, 5, 6, 7]])
                logits.append(runner.logits(runner.forward(np.arange(100), layout)))
        errors = [(found - logits[0]).square().mean() for found in logits[1:]]
        assert 0 < errors[1] < 1.5 * errors[0]


class TestMultiply:
    """Row counts and widths that end tiles, blocks and panels in every way."""

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 7, 13, 16, 25, 31, 32, 37, 48, 61, 121, 300])
    @pytest.mark.parametrize(("rows", "columns"), [(32, 64), (70, 544), (19, 96), (5, 1024)])
    @pytest.mark.parametrize(
        ("kind", "bound"), [("float32", 1e-6), ("bfloat16", 0.001), ("int8", 0.001), ("int4", 0.002)]
    )
    def test_is_the_product(self, kind, bound, rows, columns, count):
        generator = torch.Generator().manual_seed(count)
        x_TD, w_ND = (torch.randn(n, columns, generator=generator) for n in (count, rows))
        if kind in ("int8", "int4"):
            w_ND, scales = quantize(w_ND, kind)
            exact_ND = dequantize(w_ND, scales, torch.float32)
        else:
            w_ND, scales = w_ND.to(getattr(torch, kind)), None
            exact_ND = w_ND
        y_TN = multiply(as_matrix(w_ND, scales), x_TD)
        true_TN = x_TD.double() @ exact_ND.double().T
        size_TN = x_TD.norm(dim=1)[:, None] * exact_ND.float().norm(dim=1)
        assert ((y_TN - true_TN).abs() <= bound * size_TN).all()

    @pytest.mark.parametrize("kind", ["float32", "bfloat16"])
    @pytest.mark.parametrize("columns", [1, 15, 33, 90])
    @pytest.mark.parametrize("count", [1, 6, 50])
    def test_of_odd_widths(self, kind, columns, count):
        generator = torch.Generator().manual_seed(columns)
        x_TD, w_ND = (torch.randn(n, columns, generator=generator) for n in (count, 21))
        w_ND = w_ND.to(getattr(torch, kind))
        bound_TN = (2e-6 if kind == "float32" else 0.005) * (x_TD.abs() @ w_ND.float().abs().T)
        assert ((multiply(as_matrix(w_ND), x_TD) - x_TD @ w_ND.float().T).abs() <= bound_TN).all()

    @pytest.mark.parametrize(
        ("kind", "columns"),
        [*product(("float32", "bfloat16"), (24, 26, 64, 90)), ("int8", 64), ("int8", 96)],
    )
    def test_of_a_row_is_the_same_among_others(self, kind, columns):
        generator = torch.Generator().manual_seed(columns)
        x_TD, w_ND = (torch.randn(n, columns, generator=generator) for n in (23, 21))
        quantized = quantize(w_ND, "int8") if kind == "int8" else (w_ND.to(getattr(torch, kind)), None)
        matrix = as_matrix(*quantized)
        alone_TN = torch.cat([multiply(matrix, x_1D) for x_1D in x_TD.split(1)])
        for count in range(1, 24):
            assert torch.equal(multiply(matrix, x_TD[:count]), alone_TN[:count])

    @pytest.mark.parametrize("kind", ["int8", "int4"])
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("count", [3, 40])
    def test_numbers_that_are_not_finite_stay_in_their_row(self, kind, bad, count):
        x_TD = torch.randn(count, 96, generator=torch.Generator().manual_seed(0))
        x_TD[1, 70] = bad
        codes, scales = quantize(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)), kind)
        finite_T = multiply(as_matrix(codes, scales), x_TD).isfinite().all(dim=1)
        assert finite_T.tolist() == [i != 1 for i in range(count)]

    def test_codes_of_8_bits_keep_more_than_bfloat16(self):
        generator = torch.Generator().manual_seed(0)
        x_TD, w_ND = (torch.randn(n, 2048, generator=generator) for n in (9, 64))
        # One number far above the others, as the hidden units of large models have them.
        x_TD[:, 5] *= 300
        codes, scales = quantize(w_ND, "int8")
        true_TN = x_TD.double() @ dequantize(codes, scales, torch.float32).double().T
        rounded_TN = x_TD.bfloat16().double() @ dequantize(codes, scales, torch.float32).double().T
        errors = [(y - true_TN).square().mean() for y in (multiply(as_matrix(codes, scales), x_TD), rounded_TN)]
        assert errors[0] < errors[1]


class TestEngine:
    def test_texts_are_those_of_full_passes(self):
        tokenizer = make_tokenizer()
        model, rng = make_model(tokenizer), random.Random(5)
        requests = [make_request(str(i), make_prompt(rng, tokenizer), max_tokens=12) for i in range(12)]
        for kind in ("native", "torch"):
            engine = Engine(model, tokenizer, max_batch_size=5, max_context=64, prefill_tokens=30, runner=kind)
            found = [tuple(result[:3]) for result in run(engine, *requests)]
            assert found == [expected(model, tokenizer, request) for request in requests]

    def test_numbers_that_are_not_finite_end_only_their_request(self):
        tokenizer = make_tokenizer()
        # With a head of its own: else the logit of the bad token is never finite.
        model = make_model(tokenizer, tie_embeddings=False)
        good = make_request("a", [5, 6])
        alone, used = expected(model, tokenizer, good), greedy(model, tokenizer, [5, 6], good.params.max_tokens)
        bad = next(t for t in range(tokenizer.vocab_size) if t not in (*used, 5, 6, 7))
        with torch.no_grad():
            model.embed.weight[bad] = float("nan")
        engine = Engine(model, tokenizer, max_batch_size=4, max_context=64, runner="native")
        beside, broken = run(engine, good, make_request("b", [bad, 7]))
        assert broken[1] == "error"
        assert beside[:3] == alone


class TestBuild:
    def make(self, code, **variables):
        command = [sys.executable, "-c", "import torch; from moe_ray.native.build import load\n" + code]
        environment = {**os.environ, **variables}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)

    def test_without_a_compiler_torch_computes(self, monkeypatch, tmp_path):
        from moe_ray.native import build as native_build

        native_build.load.cache_clear()
        monkeypatch.setenv("CXX", str(tmp_path / "missing"))
        model = build("plain")
        cache = KVCache(model.config, 10, BLOCK_TOKENS, torch.float32, torch.device("cpu"))
        assert isinstance(make_runner(model, cache), TorchRunner)
        with pytest.raises(ConfigError, match=r"serve\.runner=native.*no C\+\+ compiler.*missing"):
            make_runner(model, cache, "native")
        monkeypatch.undo()
        native_build.load.cache_clear()
        assert isinstance(make_runner(model, cache), NativeRunner)

    def test_a_compiler_that_fails_is_named(self, tmp_path):
        done = self.make("load()", CXX="false", XDG_CACHE_HOME=str(tmp_path))
        assert "NativeUnavailableError" in done.stderr
        assert "false made no library" in done.stderr
        assert not list(tmp_path.glob("moe_ray/*.so"))

    @pytest.mark.slow
    def test_compiles_once_for_the_user_alone(self, tmp_path):
        for _ in range(2):
            done = self.make("load()", XDG_CACHE_HOME=str(tmp_path))
            assert done.returncode == 0, done.stderr
        (library,) = (tmp_path / "moe_ray").glob("*.so")
        made = library.stat().st_mtime_ns
        assert self.make("load()", XDG_CACHE_HOME=str(tmp_path)).returncode == 0
        assert library.stat().st_mtime_ns == made
        assert stat.S_IMODE((tmp_path / "moe_ray").stat().st_mode) == 0o700

    def test_a_folder_that_others_write_to_is_not_used(self, tmp_path):
        (tmp_path / "moe_ray").mkdir()
        (tmp_path / "moe_ray").chmod(0o777)
        assert "others can write" in self.make("load()", XDG_CACHE_HOME=str(tmp_path)).stderr

    def test_there_is_one_pool_of_threads(self):
        code = "load(); print(open('/proc/self/maps').read())"
        maps = self.make(code).stdout
        assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1

    def test_an_unknown_architecture_runs_in_torch(self):
        model = build_model(ModelConfig(**BASE, router="hash"), seed=0).eval()
        cache = KVCache(model.config, 10, BLOCK_TOKENS, torch.float32, torch.device("cpu"))
        assert isinstance(make_runner(model, cache), TorchRunner)
        with pytest.raises(ConfigError, match=r"model\.router=hash"):
            make_runner(model, cache, "native")


class TestQuantize:
    @pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.01), ("int4", 0.1)])
    def test_values_are_close(self, scheme, bound):
        w_eND = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(0))
        w_eND[1, 2] = 0
        codes, scales = quantize(w_eND, scheme)
        again = dequantize(codes, scales, torch.float32)
        assert again.shape == w_eND.shape
        assert (again - w_eND).square().mean().sqrt() < bound
        assert (again[1, 2] == 0).all()
        assert codes.nbytes == w_eND.nbytes // (4 if scheme == "int8" else 8)

    def test_int4_finds_a_better_range_than_the_extremes(self):
        w_ND = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
        low, high = w_ND.amin(1, keepdim=True), w_ND.amax(1, keepdim=True)
        plain = ((w_ND - low) / (high - low) * 15).round() / 15 * (high - low) + low
        again = dequantize(*quantize(w_ND, "int4"), torch.float32)
        assert (again - w_ND).square().sum() < (plain - w_ND).square().sum()

    def test_state_goes_round(self):
        model = build("window_and_biases")
        quantize_experts(model, "int4")
        state = model.layers[1].ffn.experts.state_dict()
        fresh = QuantizedExperts(model.config, "int4")
        fresh.load_state_dict(state)
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, state[name])

    def test_widths_that_do_not_divide_are_refused(self):
        with pytest.raises(ConfigError, match=r"model\.dim=56.*int8"):
            quantize_experts(build("odd_widths"), "int4")
        model = build("odd_widths")
        quantize_experts(model, "int8")
        list(both(model))
