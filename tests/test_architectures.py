"""Every architecture counts its parameters and FLOPs right, generates as it computes, and trains on any world.

Shapes: B batch, S sequence, E experts, R rows, D model dim, G width of the experts' first product.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import ModelConfig, build_config
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.errors import ConfigError
from moe_ray.models.attention import Pattern, attend_causally, window_mask
from moe_ray.models.cpu_attention import is_faster
from moe_ray.models.transformer import Transformer, build_model
from moe_ray.presets import PRESETS
from moe_ray.serving.engine.engine import Engine, check_faithful
from moe_ray.serving.engine.request import Request, SamplingParams
from tests.tiny import copy_corpus, run, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = {"dim": 32, "num_heads": 4, "num_layers": 4, "vocab_size": 96, "max_sequence_length": 64}

COUNTED = {
    "all MoE": ModelConfig(dim=32, num_heads=4, num_kv_heads=2, num_layers=2, num_experts=4, vocab_size=96),
    "first dense": ModelConfig(
        dim=32, num_heads=4, num_layers=3, num_dense_layers=1, dense_dim=72, num_experts=8, vocab_size=96
    ),
    "every other, untied": ModelConfig(
        dim=48,
        num_heads=4,
        num_kv_heads=1,
        num_layers=4,
        moe_every=2,
        num_experts=8,
        top_k=3,
        expert_dim=40,
        tie_embeddings=False,
        vocab_size=104,
    ),
    "dense, then every third": ModelConfig(
        dim=32, num_heads=2, num_layers=6, num_dense_layers=1, moe_every=3, top_k=1, vocab_size=96
    ),
    "ungated with biases": ModelConfig(**SMALL, activation="relu2", expert_ffn_bias=True, router_bias=True),
    "gated shared experts": ModelConfig(**SMALL, num_shared_experts=2, shared_expert_gate=True),
    "wide heads": ModelConfig(**SMALL, head_dim=24, qk_norm="head", attention_bias=True),
    "latent attention with biases": ModelConfig(**SMALL, preset="deepseek_v3", attention_bias=True),
    "latent attention, full queries": ModelConfig(**SMALL, preset="deepseek_v3", q_lora_rank=None),
    "forced balance": ModelConfig(**SMALL, router="forced_balance"),
    **{preset: ModelConfig(**SMALL, preset=preset) for preset in PRESETS},
}
counted = pytest.mark.parametrize("config", COUNTED.values(), ids=COUNTED.keys())


@counted
def test_num_params_equals_the_built_model(config):
    assert config.num_params() == sum(p.numel() for p in build_model(config, seed=0).parameters())


@counted
def test_num_active_params_counts_the_experts_that_one_token_reaches(config):
    model = build_model(config, seed=0).eval()
    output = model(torch.tensor([[3]]))
    model.logits(output.hidden_BSD).logsumexp(-1).sum().backward()
    active = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            reached_E = parameter.grad.flatten(1).abs().sum(1) > 0
            active += int(reached_E.sum()) * parameter[0].numel()
        else:
            active += parameter.numel()
    assert active == config.num_active_params()
    assert active < config.num_params()


def grouped_mm_flops(left_shape, right_shape, *_, out_shape=None, **__) -> int:
    """[R, D] x [E, D, G] spends 2RDG in all; [G, R] x [R, D] splits R among the experts and spends 2GRD."""
    rows, inner = left_shape
    return 2 * rows * inner * right_shape[-1]


@counted
def test_flops_per_token_equal_the_counted_matmuls(config):
    batch, sequence = 2, 24
    # Dropped tokens would be missing, and the key for a sink and the padding of values would be too many.
    exact = {"capacity_factor": None, "attention_sinks": False}
    exact |= {"v_head_dim": config.qk_dim} if config.attention == "mla" else {}
    config = config.model_copy(update=exact)
    model = build_model(config, seed=0)
    tokens_BS = torch.randint(config.vocab_size, (batch, sequence))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: grouped_mm_flops})
    # The math backend computes all S x S scores, as flops_per_token counts; fused causal ones skip half of them
    # and recompute in backward.
    with sdpa_kernel(SDPBackend.MATH), counter:
        output = model(tokens_BS)
        model.logits(output.hidden_BSD).sum().backward()
    assert counter.get_total_flops() == batch * sequence * config.flops_per_token(sequence)


def test_a_preset_is_where_settings_start():
    assert ModelConfig(preset="deepseek_v3").score_func == "sigmoid"
    assert ModelConfig(preset="deepseek_v3", score_func="softmax").score_func == "softmax"
    resolved = build_config({"model": {"preset": "gpt_oss", "dim": 64}})
    assert build_config(resolved.model_dump(mode="json")) == resolved
    assert build_config({}, ["model.preset=olmoe"]).model.qk_norm == "full"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "no_such"}, "model.preset='no_such' is not allowed"),
        ({"router": "topk"}, "model.router='topk' is unknown.*expert_choice"),
        (
            {"router": "hash", "score_func": "sigmoid"},
            "model.score_func='sigmoid' has no meaning with model.router=hash",
        ),
        ({"router": "expert_choice", "capacity_factor": 1.0}, "model.capacity_factor=1.0 has no meaning"),
        ({"score_func": "sigmoid", "softmax_after_top_k": True}, "no softmax"),
        ({"num_expert_groups": 3, "num_limited_groups": 2}, "model.num_expert_groups=3 .* model.num_experts=8"),
        ({"num_expert_groups": 8, "num_limited_groups": 1}, "model.top_k=2 is more than the 1 experts"),
        ({"attention": "mla", "qk_norm": "head"}, "model.qk_norm='head' has no meaning in model.attention=mla"),
        ({"attention": "mla", "num_kv_heads": 2}, "model.num_kv_heads=2 .* set it to 4"),
        ({"full_attention_every": 2}, "without model.sliding_window does nothing"),
        ({"full_attention_every": 1, "sliding_window": 4}, "model.full_attention_every=1 does nothing"),
        ({"capacity_factor": 1e30}, "model.capacity_factor=1e[+]30 is not allowed"),
        ({"rope_theta": 1}, "model.rope_theta=1 is not allowed"),
        ({"shared_expert_gate": True}, "without shared experts"),
        ({"head_dim": 33}, "model.head_dim=33 is odd"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "has no original_length"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "model.rope_scaling.type='dynamic' is not allowed"),
        ({"rope_scaling": {"kind": "yarn"}}, "model.rope_scaling.kind"),
        ({"init_from": "a", "upcycle_from": "b"}, "both set"),
    ],
)
def test_impossible_architectures_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_config({"model": fields})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("router", ["hash", "forced_balance", "expert_choice"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_every_router(preset: str, router: str) -> None:
    build_model(ModelConfig(**SMALL, preset=preset, router=router), 0)


@pytest.mark.parametrize("window", [None, 7])
def test_attention_sinks_take_part_in_the_softmax_and_bring_no_value(window: int | None) -> None:
    torch.manual_seed(0)
    heads, kv_heads, length, width = 4, 2, 33, 16
    q, k, v = (torch.randn(2, h, length, width, requires_grad=True) for h in (heads, kv_heads, kv_heads))
    sinks_H = torch.randn(heads, requires_grad=True)
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    scores = scores.masked_fill(~window_mask(torch.arange(length), length, window), float("-inf"))
    sinks = sinks_H.view(1, -1, 1, 1).expand(2, heads, length, 1)
    expected = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    actual = attend_causally(q, k, v, Pattern(0.3, window, sinks_H))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    grad, inputs = torch.randn_like(actual), (q, k, v, sinks_H)
    grads = torch.autograd.grad(actual, inputs, grad)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, inputs, grad), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kv_heads", "value_width"), [(2, 16), (4, 8)])
def test_short_attention_in_bfloat16_equals_the_fused_one(kv_heads: int, value_width: int) -> None:
    torch.manual_seed(0)
    shapes = ((4, 16), (kv_heads, 16), (kv_heads, value_width))
    exact = [torch.randn(3, heads, 40, width, requires_grad=True) for heads, width in shapes]
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    assert is_faster(low[0])
    assert not is_faster(exact[0])
    assert not is_faster(low[0][:0])
    expected = attend_causally(*exact, Pattern(0.25))
    actual = attend_causally(*low, Pattern(0.25))
    grad = torch.randn_like(expected)
    pairs = [(actual, expected)]
    grads = torch.autograd.grad(actual, low, grad.bfloat16())
    pairs += zip(grads, torch.autograd.grad(expected, exact, grad), strict=True)
    for value, reference in pairs:
        assert (value.float() - reference).norm() < 0.01 * reference.norm()


GENERATING = {preset: {"preset": preset} for preset in PRESETS if preset != "custom"} | {
    "hash": {"router": "hash"},
    "short window": {"preset": "gpt_oss", "sliding_window": 5},
    "window everywhere": {"preset": "mixtral", "sliding_window": 4},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_length": 16}},
}


def greedy(model: Transformer, prompt: list[int], max_tokens: int) -> list[int]:
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(max_tokens):
            logits_V = model.logits(model(torch.tensor([tokens])).hidden_BSD[0, -1])
            tokens.append(int(logits_V.argmax()))
    return tokens


@pytest.mark.parametrize("fields", GENERATING.values(), ids=GENERATING.keys())
def test_generation_in_a_batch_equals_full_forward_passes(fields: dict[str, Any]) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat and saw the other cat"] * 5, 257)
    # A large init_std sets the logits far apart; sequences are scored without dropping, as generation does.
    fields = {"dim": 32, "num_layers": 4, "max_sequence_length": 64, "init_std": 0.3, **fields}
    fields |= {"vocab_size": 257, "eval_capacity_factor": None}
    model = build_model(ModelConfig(**fields), 0).eval()
    for block in model.layers:
        if getattr(block.attention, "sinks_H", None) is not None:
            torch.nn.init.normal_(block.attention.sinks_H)
    engine = Engine(model, tokenizer, max_batch_size=3, max_context=64, prefill_tokens=16)
    rng = random.Random(0)
    prompts = [[rng.randrange(1, 257) for _ in range(rng.randint(1, 30))] for _ in range(5)]
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=10)
        engine.submit(Request(str(index), tuple(prompt), params))
    generations = dict(engine._generations)
    while engine.has_work:
        engine.step()
    for index, prompt in enumerate(prompts):
        tokens = generations[str(index)].sequence.tokens
        assert len(tokens) > len(prompt)
        assert tokens == greedy(model, prompt, len(tokens) - len(prompt)), index


def test_expert_choice_generates_only_if_asked_to() -> None:
    config = ModelConfig(router="expert_choice")
    with pytest.raises(ConfigError, match=r"not causal.*serve.allow_unfaithful_routing=true"):
        check_faithful(config, allow_unfaithful_routing=False)
    check_faithful(config, allow_unfaithful_routing=True)
    with pytest.raises(ConfigError, match="routes by the place of a token"):
        check_faithful(ModelConfig(router="forced_balance"), allow_unfaithful_routing=False)
    check_faithful(ModelConfig(), allow_unfaithful_routing=False)


ARCHITECTURES = {
    "switch": ["model.preset=switch", "model.router_jitter=0"],
    "deepseek_v3": ["model.preset=deepseek_v3", "model.num_experts=16"],
    "gpt_oss": ["model.preset=gpt_oss", "model.sliding_window=8", "model.num_experts=8"],
    "expert_choice": ["model.router=expert_choice"],
    "hash": ["model.router=hash"],
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_run_goes_on_with_another_world_and_is_served(name: str, tmp_path: Path) -> None:
    corpus = copy_corpus(tmp_path)
    settings = tiny_settings(corpus, tmp_path, "moved")
    for field in ("num_experts", "top_k", "num_kv_heads"):
        settings["model"].pop(field)
    settings["train"]["steps"] = 6
    # A constant rate: that of a run which is longer is the same.
    settings["optim"]["min_lr_ratio"] = 1.0
    whole = run(build_config(settings, [*ARCHITECTURES[name], "train.name=whole"]))
    two_ranks = [*ARCHITECTURES[name], "parallel.workers=2", "parallel.ep=2"]
    run(build_config(settings, [*two_ranks, "train.steps=4"]))
    moved = run(build_config(settings, ARCHITECTURES[name]))
    assert [m["loss"] for m in moved] == pytest.approx([m["loss"] for m in whole], rel=1e-5)
    assert moved[-1]["loss"] < moved[0]["loss"]
    if name == "switch":
        assert 0 < moved[-1]["dropped_fraction"] < 1
    elif name != "expert_choice":
        assert moved[-1]["dropped_fraction"] == 0
    model = load_for_inference(tmp_path / "moved").model
    biases = [moe.router.expert_bias_E for moe in model.moe_modules() if hasattr(moe.router, "expert_bias_E")]
    assert all((bias_E is not None and bias_E.abs().max() > 0) == (name == "deepseek_v3") for bias_E in biases)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["basic", "deepseek_v3", "gpt_oss"])
def test_compiles_to_one_graph_with_equal_gradients(preset: str) -> None:
    sizes = {"vocab_size": 128, "dim": 64, "num_layers": 2, "max_sequence_length": 64}
    model = build_model(ModelConfig(preset=preset, **sizes), 0)
    tokens_BS = torch.randint(128, (2, 32), generator=torch.Generator().manual_seed(0))
    results = []
    for function in (model, torch.compile(model, fullgraph=True)):
        hidden_BSD = function(tokens_BS).hidden_BSD
        loss = torch.nn.functional.cross_entropy(model.logits(hidden_BSD).flatten(0, 1), tokens_BS.flatten())
        loss.backward()
        results.append([hidden_BSD, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
