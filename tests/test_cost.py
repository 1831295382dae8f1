"""Costs of models against what the models themselves have, keep and send."""

import math
from typing import Any

import pytest
import torch

from moe_ray.analytics.cost import (
    activation_bytes,
    decode_bytes,
    dense_model,
    forward_flops,
    kv_cache_bytes,
    run_cost,
)
from moe_ray.analytics.profiles import DEVICES, THIS_MACHINE, measure_this_machine
from moe_ray.config import Config, build_config
from moe_ray.model_config import ModelConfig
from moe_ray.models.losses import next_token_loss
from moe_ray.models.transformer import build_model
from moe_ray.serving.engine.cache import BLOCK_TOKENS, bytes_per_block

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS: dict[str, dict[str, Any]] = {
    "basic": {},
    "fine-grained": {"num_experts": 64, "top_k": 8, "expert_dim": 64},
    "shared and dense": {"num_dense_layers": 2, "num_shared_experts": 1},
    "mla": {"attention": "mla"},
    "window": {"sliding_window": 64, "full_attention_every": 2},
}


@pytest.fixture(params=MODELS, name="model")
def _model(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig.model_validate(MODELS[request.param])


def make_config(*overrides: str) -> Config:
    return build_config({"train": {"dtype": "bfloat16"}, "parallel": {"workers": 4, "ep": 2}}, list(overrides))


def test_dense_models_are_of_equal_size(model: ModelConfig) -> None:
    active = dense_model(model, model.top_k)
    routers = len(model.moe_layers) * model.dim * model.num_experts
    assert active.num_params() == active.num_active_params() == model.num_active_params() - routers
    assert dense_model(model, model.num_experts).num_params() == model.num_params() - routers
    # It is a model that can be built.
    assert sum(p.numel() for p in build_model(active, 0).parameters()) == active.num_params()


def test_flops_of_a_forward_pass_are_a_third_of_training(model: ModelConfig) -> None:
    if model.sliding_window is None:
        assert forward_flops(model, 100) == pytest.approx(model.flops_per_token(100) / 3)
    else:
        # Two of four blocks see no more than the window.
        far, window = forward_flops(model, 512), model.flops_per_token(64) / 3
        assert far == pytest.approx((window + model.flops_per_token(512) / 3) / 2)


def test_cache_is_that_of_the_engine(model: ModelConfig) -> None:
    assert BLOCK_TOKENS * kv_cache_bytes(model, "bfloat16") == bytes_per_block(model, torch.bfloat16)


def test_decoding_reads_the_experts_that_a_batch_meets() -> None:
    model = ModelConfig(num_experts=64, top_k=8)
    one, many = decode_bytes(model, 0, 1, "float32"), decode_bytes(model, 0, 1000, "float32")
    assert one == pytest.approx(4 * model.num_active_params())
    assert many == pytest.approx(4 * model.num_params())
    assert decode_bytes(model, 10, 3, "float32") - decode_bytes(model, 0, 3, "float32") == 30 * kv_cache_bytes(
        model, "float32"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(model: ModelConfig, dtype: Any) -> None:
    built, tokens_BS = build_model(model, 0), torch.randint(model.vocab_size, (4, 128))
    own = {parameter.untyped_storage().data_ptr() for parameter in built.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        logits_TV = built.logits(built(tokens_BS).hidden_BSD.flatten(0, 1))
        next_token_loss(logits_TV, tokens_BS.flatten(), tokens_BS.numel())
    gradient = 4 * logits_TV.numel()
    counted = sum(storage.nbytes() for storage in kept.values()) + gradient
    assert activation_bytes(model, tokens_BS.numel(), dtype) == pytest.approx(counted, rel=0.2)


def test_cost_of_a_run() -> None:
    config = make_config("train.steps=1000")
    metrics = [{"world_size": 4, "ep": 2, "tokens_per_second": speed} for speed in (900.0, 1000.0, 5000.0)]
    cost = run_cost(config, metrics, DEVICES)
    ours, active, total = cost.models
    assert (cost.world_size, cost.ep, cost.dtype) == (4, 2, "bfloat16")
    assert ours.params == config.model.num_params()
    assert ours.training_flops == config.model.flops_per_token(config.data.sequence_length)
    assert (active.active_params, total.params) == pytest.approx((ours.active_params, ours.params), rel=0.02)
    # Half of the copies of a token go to the other rank of two.
    rows = 4 * 2 * 256 * 2 / 2
    sent = ours.communication
    assert {sent.dispatch_forward, sent.combine_forward, sent.dispatch_backward, sent.combine_backward} == {rows}
    assert active.communication.dispatch_forward == 0
    assert ours.communication.gradients_per_step < total.communication.gradients_per_step
    assert ours.memory.weights < total.memory.weights
    assert ours.memory.optimizer == 2 * ours.memory.weights
    assert cost.measured is not None
    assert cost.measured.training == 1000
    fastest = ours.speeds[0]
    assert cost.measured.predicted_over_measured["h100"] == pytest.approx(fastest.training / 1000)
    assert all(fast.training > slow.training for fast, slow in zip(active.speeds, total.speeds, strict=True))
    assert run_cost(config, [], DEVICES).measured is None


def test_this_machine_is_measured() -> None:
    device = measure_this_machine("float32", 2, (256, 256, 512))
    assert device.name == THIS_MACHINE
    assert 1e8 < device.float32_flops < 1e15
    assert 0 < device.efficiency <= 1
    assert all(math.isfinite(rate) and rate > 1e6 for rate in (device.memory_bandwidth, device.intra_bandwidth))
