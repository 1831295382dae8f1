"""Every router and its losses against their definitions, on numbers worked out by hand.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, K experts a token.
"""

import dataclasses
import importlib
import math
import re
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moe_ray.config import ModelConfig
from moe_ray.errors import ConfigError
from moe_ray.models.capacity import expert_capacity, limit_capacity
from moe_ray.models.losses import load_balancing_loss, router_z_loss, sequence_load_balancing_loss
from moe_ray.models.moe import MoE, make_router
from moe_ray.models.router import Router, Routing
from moe_ray.models.transformer import build_model
from moe_ray.training.optimizer import build_optimizer
from moe_ray.training.step import auxiliary_losses

DIM = 8


def make_config(**fields) -> ModelConfig:
    sizes = {"vocab_size": 50, "dim": DIM, "num_heads": 2, "num_layers": 1, "expert_dim": 16, "num_experts": 4}
    return ModelConfig(**(sizes | fields))


def route(logits_TE: list[list[float]], batch: int = 1, training: bool = False, **fields) -> Routing:
    """What the router decides when its logits are these: the hidden states are the logits, the weight a unit."""
    num_experts = len(logits_TE[0])
    router = make_router(make_config(num_experts=num_experts, dim=8 * math.ceil(num_experts / 8), **fields))
    router.init_state("0")
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
        router.weight.copy_(torch.eye(*router.weight.shape))
    x_TD = torch.zeros(len(logits_TE), router.weight.shape[1])
    x_TD[:, :num_experts] = torch.tensor(logits_TE)
    return router.train(training)(
        x_TD.view(batch, -1, x_TD.shape[1]), torch.zeros(batch, len(x_TD) // batch).long()
    )


def log(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_softmax_over_all_experts_or_over_the_chosen_ones():
    logits = [log(0.1, 0.2, 0.3, 0.4)]
    over_all = route(logits, top_k=2, route_norm=False)
    assert over_all.expert_ids_TK.tolist() == [[3, 2]]
    torch.testing.assert_close(over_all.weights_TK, torch.tensor([[0.4, 0.3]]))
    over_chosen = route(logits, top_k=2, route_norm=False, softmax_after_top_k=True)
    torch.testing.assert_close(over_chosen.weights_TK, torch.tensor([[4 / 7, 3 / 7]]))
    scaled = route(logits, top_k=2, route_norm=True, route_scale=2.5)
    torch.testing.assert_close(scaled.weights_TK, torch.tensor([[10 / 7, 7.5 / 7]]))


def test_sigmoid_scores_are_not_shares_but_the_probabilities_are():
    routing = route([[0.0, math.log(3), -math.log(3), 0.0]], top_k=2, score_func="sigmoid", route_norm=False)
    assert routing.expert_ids_TK[0, 0] == 1
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.75, 0.5]]))
    torch.testing.assert_close(routing.probs_TE, torch.tensor([[0.25, 0.375, 0.125, 0.25]]))


def test_expert_bias_chooses_but_does_not_weigh_and_moves_towards_balance():
    config = make_config(top_k=1, score_func="sigmoid", expert_bias=True, route_norm=False)
    router = make_router(config)
    router.init_state("0")
    with torch.no_grad():
        router.weight.copy_(torch.eye(4, DIM))
    x_BSD = torch.zeros(1, 1, DIM)
    x_BSD[0, 0, 2] = 1.0
    tokens_BS = torch.zeros(1, 1, dtype=torch.int64)
    assert router(x_BSD, tokens_BS).expert_ids_TK.tolist() == [[2]]
    router.update_expert_bias(torch.tensor([0.0, 0.25, 0.5, 0.25]))
    torch.testing.assert_close(router.expert_bias_E, torch.tensor([0.001, 0.0, -0.001, 0.0]))
    router.expert_bias_E[0] = 1.0
    routing = router(x_BSD, tokens_BS)
    assert routing.expert_ids_TK.tolist() == [[0]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.5]]))


def test_balanced_experts_keep_their_bias():
    # The mean of elevenths is not an eleventh in floating point.
    router = make_router(make_config(num_experts=11, expert_bias=True))
    router.init_state("0")
    router.update_expert_bias(torch.full((11,), 1 / 11))
    assert router.expert_bias_E.tolist() == [0.0] * 11


def test_optimizer_moves_the_expert_bias_before_its_step_by_the_load_of_the_global_batch():
    config = make_config(top_k=2, score_func="sigmoid", expert_bias=True, expert_bias_update_rate=0.5)
    model = build_model(config, 0)
    optimizer = build_optimizer(model, SimpleNamespace(lr=0.1, weight_decay=0.0, beta1=0.9, beta2=0.9, eps=1e-8))
    router = next(model.moe_modules()).router
    router.load_fraction_E.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    optimizer.step()
    assert router.expert_bias_E.tolist() == [0.5, 0.5, -0.5, -0.5]


def test_limited_groups_equal_a_search_over_all_of_them():
    torch.manual_seed(0)
    logits_TE = torch.randn(40, 12)
    fields = {"num_expert_groups": 4, "num_limited_groups": 2, "top_k": 3, "score_func": "sigmoid"}
    routing = route(logits_TE.tolist(), **fields)
    for scores_E, ids_K in zip(logits_TE.sigmoid(), routing.expert_ids_TK, strict=True):
        groups = scores_E.view(4, 3)
        best = groups.topk(2, dim=1).values.sum(1).topk(2).indices.tolist()
        allowed = {3 * g + i for g in best for i in range(3)}
        expected = sorted(allowed, key=lambda e: -scores_E[e])[:3]
        assert ids_K.tolist() == expected


def test_jitter_and_noise_act_in_training_only():
    logits = torch.ones(200, 4).tolist()
    calm = route(logits, top_k=1, router_jitter=0.1)
    assert (calm.logits_TE == 1).all()
    jittered = route(logits, top_k=1, router_jitter=0.1, training=True).logits_TE
    assert 0.9 <= jittered.min() < 0.92
    assert 1.08 < jittered.max() <= 1.1
    assert (route(logits, top_k=1, noisy_top_k=True).logits_TE == 1).all()
    # softplus(0) = log 2 is the size of the noise while its weights are zero.
    noisy = route(logits, top_k=1, noisy_top_k=True, training=True).logits_TE
    assert noisy.std().item() == pytest.approx(math.log(2), rel=0.1)


def test_expert_choice_gives_each_expert_its_best_tokens_of_each_sequence():
    # Two sequences of two tokens, two experts, on average one expert a token: each expert takes one token.
    logits = [log(0.9, 0.1), log(0.8, 0.2), log(0.3, 0.7), log(0.4, 0.6)]
    routing = route(logits, batch=2, top_k=1, router="expert_choice", route_norm=False)
    assert routing.expert_ids_TK.tolist() == [[0], [1], [1], [0]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.9], [0.2], [0.7], [0.4]]))
    # Where one token is best for both, the other gets none.
    routing = route([[1.0, 1.0], [0.0, 0.0]], top_k=1, router="expert_choice", route_norm=False)
    assert routing.expert_ids_TK[0].sort().values.tolist() == [0, 1]
    assert routing.expert_ids_TK[1].tolist() in ([0, 1], [2, 2])


def test_expert_choice_balances_and_reports_tokens_without_expert():
    torch.manual_seed(1)
    routing = route(torch.randn(60, 4).tolist(), batch=3, top_k=1, router="expert_choice")
    assert routing.tokens_per_expert().tolist() == [15] * 4
    without = (routing.expert_ids_TK == 4).all(dim=1).sum()
    assert 0 < without == routing.num_dropped
    assert (routing.weights_TK[routing.expert_ids_TK == 4] == 0).all()


def test_hash_routing_depends_on_the_token_id_alone():
    config = make_config(router="hash", top_k=2, num_experts=8, vocab_size=4000)
    first, second = (make_router(config) for _ in range(2))
    first.init_state("a")
    second.init_state("a")
    tokens_BS = torch.arange(4000).view(4, 1000)
    routing = first(torch.randn(4, 1000, DIM), tokens_BS)
    assert torch.equal(routing.expert_ids_TK, second(torch.randn(4, 1000, DIM), tokens_BS).expert_ids_TK)
    assert (routing.expert_ids_TK[:, 0] != routing.expert_ids_TK[:, 1]).all()
    assert (routing.load() - 1000).abs().max() < 120
    assert (routing.weights_TK == 0.5).all()
    second.init_state("b")
    assert not torch.equal(first.expert_ids_VK, second.expert_ids_VK)


def test_forced_balance_gives_every_expert_as_many_tokens_and_the_router_a_gradient():
    config = make_config(router="forced_balance", top_k=2)
    router = make_router(config)
    torch.nn.init.normal_(router.weight)
    routing = router(torch.randn(3, 10, DIM), torch.zeros(3, 10, dtype=torch.int64))
    assert routing.load().tolist() == [15] * 4
    routing.weights_TK[:, 0].sum().backward()
    assert router.weight.grad.abs().sum() > 0


def choices(*ids: int, num_experts: int = 2) -> Routing:
    ids_T1 = torch.tensor(ids)[:, None]
    return Routing(None, torch.full((len(ids), num_experts), 1 / num_experts), ids_T1, torch.ones(len(ids), 1))


def test_capacity_keeps_the_first_tokens_of_each_sequence():
    assert expert_capacity(1.25, length=6, top_k=1, num_experts=4) == 2
    assert expert_capacity(1.1, length=100, top_k=1, num_experts=10) == 11
    assert expert_capacity(0.1, length=1, top_k=1, num_experts=8) == 1
    limited = limit_capacity(choices(0, 0, 1, 0, 1, 1, 1, 0), batch=2, capacity=2)
    assert limited.kept_TK.flatten().tolist() == [True, True, True, False, True, True, False, True]
    assert limited.weights_TK.flatten().tolist() == [1, 1, 1, 0, 1, 1, 0, 1]
    assert limited.num_dropped == 2
    assert limited.load().tolist() == [4, 4]
    assert limited.tokens_per_expert().tolist() == [3, 3]


def test_a_later_token_never_takes_the_place_of_an_earlier_one():
    torch.manual_seed(0)
    ids = torch.randint(3, (30,)).tolist()
    whole = limit_capacity(choices(*ids, num_experts=3), batch=1, capacity=4).kept_TK
    for length in (1, 7, 20):
        start = limit_capacity(choices(*ids[:length], num_experts=3), batch=1, capacity=4).kept_TK
        assert torch.equal(whole[:length], start)


def test_capacity_counts_only_what_the_router_kept():
    kept_T1 = torch.tensor([False, False, True, True])[:, None]
    routing = dataclasses.replace(choices(0, 0, 0, 0), kept_TK=kept_T1, weights_TK=kept_T1.float())
    limited = limit_capacity(routing, batch=1, capacity=1)
    assert limited.kept_TK.flatten().tolist() == [False, False, True, False]
    assert limited.num_dropped == 1


def make_switch(**fields) -> tuple[MoE, Tensor, Tensor]:
    torch.manual_seed(0)
    moe = MoE(make_config(top_k=1, route_norm=False, **fields))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return moe, torch.randn(2, 12, DIM), torch.zeros(2, 12, dtype=torch.int64)


def test_dropped_tokens_add_nothing_and_get_no_gradient():
    moe, x_BSD, tokens_BS = make_switch(capacity_factor=0.5)
    x_BSD.requires_grad_()
    y_BSD, routing = moe(x_BSD, tokens_BS)
    dropped_BS = ~routing.kept_TK.view(2, 12)
    assert 0 < dropped_BS.sum() == routing.num_dropped
    assert (y_BSD[dropped_BS] == 0).all()
    assert (y_BSD[~dropped_BS].abs().sum(-1) > 0).all()
    expected_BSD, _ = moe(x_BSD, tokens_BS, dropless=True)
    torch.testing.assert_close(y_BSD[~dropped_BS], expected_BSD[~dropped_BS])
    grads = torch.autograd.grad(y_BSD.square().sum(), (x_BSD, *moe.parameters()))
    assert (grads[0][dropped_BS] == 0).all()
    kept = expected_BSD[~dropped_BS].square().sum()
    expected = torch.autograd.grad(kept, (x_BSD, *moe.parameters()))
    torch.testing.assert_close(grads, expected)


def test_training_and_evaluation_have_capacities_of_their_own():
    moe, x_BSD, tokens_BS = make_switch(capacity_factor=0.5, eval_capacity_factor=1.0)
    dropped = [int(moe.train(training)(x_BSD, tokens_BS)[1].num_dropped) for training in (True, False)]
    assert dropped[0] > dropped[1] > 0
    moe, x_BSD, tokens_BS = make_switch(capacity_factor=0.5)
    assert moe.eval()(x_BSD, tokens_BS)[1].num_dropped is None


def test_a_layer_in_which_all_is_dropped_still_has_gradients():
    moe, x_BSD, tokens_BS = make_switch()
    routing = moe.router(x_BSD, tokens_BS)
    nothing = limit_capacity(routing, 2, 0)
    y_TD = moe.dispatcher.dispatch(x_BSD.flatten(0, 1).requires_grad_(), nothing)
    assert y_TD.x_RD.shape == (0, DIM)
    out = moe.experts(y_TD.x_RD, y_TD.tokens_per_expert_e)
    total = moe.dispatcher.combine(out, nothing, y_TD.plan).sum()
    total.backward()
    assert total == 0
    assert all((parameter.grad == 0).all() for parameter in moe.parameters())


def test_load_balancing_losses_on_a_worked_example():
    # Two sequences of two tokens. Sequence one: both to expert 0; sequence two: one each.
    probs_TE = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    ids_TK = torch.tensor([[0], [0], [0], [1]])
    # Over all: f = (3/4, 1/4), P = (2.4/4, 1.6/4): 2 * (0.75 * 0.6 + 0.25 * 0.4) = 1.1
    assert load_balancing_loss(probs_TE, torch.tensor([0.75, 0.25]), 4).item() == pytest.approx(1.1)
    # By sequence: 2 * (1 * 0.8) = 1.6 and 2 * (0.5 * 0.4 + 0.5 * 0.6) = 1.0; their mean is 1.3.
    assert sequence_load_balancing_loss(probs_TE, ids_TK, 2, 4).item() == pytest.approx(1.3)
    # logsumexp of (log 2, log 2) is log 4.
    assert router_z_loss(torch.full((3, 2), math.log(2)), 6).item() == pytest.approx(math.log(4) ** 2 / 2)


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_scope_of_the_load_balancing_loss(scope):
    config = make_config(load_balancing_scope=scope, load_balancing_loss_weight=2.0, router_z_loss_weight=0.0)
    model = build_model(config, 0)
    tokens_BS = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(0))
    (routing,) = model(tokens_BS).routings
    load_E = torch.tensor([0.4, 0.3, 0.2, 0.1])
    next(model.moe_modules()).router.load_fraction_E.copy_(load_E)
    expected = {
        "micro_batch": load_balancing_loss(routing.probs_TE, routing.load() / 48, 100),
        "sequence": sequence_load_balancing_loss(routing.probs_TE, routing.expert_ids_TK, 3, 100),
        "global_batch": load_balancing_loss(routing.probs_TE, load_E, 100),
    }
    actual = auxiliary_losses(model, [routing], 3, 100)
    torch.testing.assert_close(actual, 2 * expected[scope])
    assert len({round(value.item(), 6) for value in expected.values()}) == 3


def test_shared_experts_with_a_gate_add_to_the_routed_ones():
    torch.manual_seed(0)
    moe = MoE(make_config(num_shared_experts=2, shared_expert_gate=True))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x_BSD, tokens_BS = torch.randn(1, 5, DIM), torch.zeros(1, 5, dtype=torch.int64)
    both_BSD, _ = moe(x_BSD, tokens_BS)
    gate_up = x_BSD @ moe.shared.w_in.weight.T
    gate, up = gate_up.chunk(2, dim=-1)
    assert gate.shape[-1] == 2 * 16
    shared = (torch.nn.functional.silu(gate) * up) @ moe.shared.w_out.weight.T
    shared = shared * (x_BSD @ moe.shared_gate.weight.T).sigmoid()
    moe.shared = None
    torch.testing.assert_close(both_BSD, moe(x_BSD, tokens_BS)[0] + shared)


def test_biases_and_ungated_activations_equal_a_loop_over_tokens():
    torch.manual_seed(0)
    for activation in ("swigluoai", "geglu", "gelu", "relu", "relu2"):
        moe = MoE(make_config(activation=activation, expert_ffn_bias=True, router_bias=True))
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
        x_BSD = torch.randn(1, 9, DIM, requires_grad=True)
        y_BSD, routing = moe(x_BSD, torch.zeros(1, 9, dtype=torch.int64))
        rows = []
        for x_D, ids_K, weights_K in zip(x_BSD[0], routing.expert_ids_TK, routing.weights_TK, strict=True):
            outputs = []
            for expert in ids_K:
                h_G = moe.experts.w_in_eGD[expert] @ x_D + moe.experts.b_in_eG[expert]
                a_F = moe.experts.activation.forward(h_G)
                outputs.append(moe.experts.w_out_eDF[expert] @ a_F + moe.experts.b_out_eD[expert])
            rows.append(weights_K @ torch.stack(outputs))
        expected_BSD = torch.stack(rows).unsqueeze(0)
        torch.testing.assert_close(y_BSD, expected_BSD)
        inputs = (x_BSD, *moe.parameters())
        grad_BSD = torch.randn_like(y_BSD)
        actual = torch.autograd.grad(y_BSD, inputs, grad_BSD, retain_graph=True)
        torch.testing.assert_close(actual, torch.autograd.grad(expected_BSD, inputs, grad_BSD))


class TestOwnRouter:
    @pytest.fixture
    def example(self, tmp_path: Path, monkeypatch) -> str:
        """The router of docs/routers.md, saved where the page says."""
        page = Path("docs/routers.md").read_text()
        code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
        assert len([line for line in code.splitlines() if line]) < 30
        (tmp_path / "cosine_router.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        yield "cosine_router:CosineRouter"
        sys.modules.pop("cosine_router", None)

    def test_example_of_the_docs_routes_and_learns(self, example):
        config = make_config(router=example, capacity_factor=1.0)
        model = build_model(config, 0)
        router = next(model.moe_modules()).router
        assert isinstance(router, Router)
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                output = model(torch.randint(50, (2, 16)))
            (routing,) = output.routings
            assert routing.load().sum() == 2 * 16 * 2
            assert routing.weights_TK.dtype == torch.float32
            assert router.scale == 10
            loss = output.hidden_BSD.square().sum() + auxiliary_losses(model, output.routings, 2, 32)
            router.weight.grad = None
            loss.backward()
            assert router.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("router", "message"),
        [
            ("no_such_module:X", "cannot be imported: No module named"),
            ("json:NoSuchClass", "cannot be imported"),
            ("json:JSONDecoder", "no subclass of moe_ray.models.router.Router"),
            ("os:system", "no subclass"),
        ],
    )
    def test_what_is_no_router_is_refused(self, router, message):
        with pytest.raises(ConfigError, match=message):
            make_router(make_config(router=router))

    @pytest.fixture
    def misbehaving(self, tmp_path: Path, monkeypatch):
        """Builds the model with a router that changes the `Routing` of the default one."""
        code = """
            import dataclasses
            import torch
            from torch import nn
            from moe_ray.models.router import Router
            from moe_ray.models.top_k_router import TopKRouter

            class Changed(TopKRouter):
                def forward(self, x_BSD, tokens_BS):
                    return self.change(super().forward(x_BSD, tokens_BS))

            class Forgetful(Router):
                def __init__(self, config):
                    super().__init__(config)
                    self.norm = nn.LayerNorm(config.dim)
                    self.register_buffer("gain", torch.ones(2))
        """
        (tmp_path / "misbehaving.py").write_text(textwrap.dedent(code))
        monkeypatch.syspath_prepend(tmp_path)
        yield importlib.import_module("misbehaving")
        sys.modules.pop("misbehaving", None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: (r.expert_ids_TK, r.weights_TK), "returned tuple instead of a Routing"),
            (
                lambda r: dataclasses.replace(r, expert_ids_TK=r.expert_ids_TK.int()),
                "expert_ids_TK as torch.int32",
            ),
            (lambda r: dataclasses.replace(r, weights_TK=r.weights_TK[:-1]), "weights_TK as .* of shape"),
            (lambda r: dataclasses.replace(r, probs_TE=r.probs_TE.bfloat16()), "probs_TE as torch.bfloat16"),
            (lambda r: dataclasses.replace(r, expert_ids_TK=r.expert_ids_TK + 4), "outside 0 to 3"),
            (lambda r: dataclasses.replace(r, weights_TK=r.weights_TK * math.nan), "not finite"),
            (lambda r: dataclasses.replace(r, probs_TE=r.probs_TE * 2), "probs_TE that do not sum to 1"),
            (lambda r: dataclasses.replace(r, kept_TK=r.expert_ids_TK > 1), "not kept"),
        ],
    )
    def test_a_wrong_routing_is_explained(self, misbehaving, change, message):
        misbehaving.Changed.change = staticmethod(change)
        model = build_model(make_config(router="misbehaving:Changed"), 0)
        with pytest.raises(ConfigError, match=f"misbehaving:Changed.*{message}"):
            model(torch.randint(50, (2, 16)))

    def test_buffers_without_values_are_refused(self, misbehaving):
        with pytest.raises(ConfigError, match="leaves its buffer gain without values"):
            build_model(make_config(router="misbehaving:Forgetful"), 0)

        def init_state(router, key):
            Router.init_state(router, key)
            router.gain.fill_(3.0)

        misbehaving.Forgetful.init_state = init_state
        router = next(build_model(make_config(router="misbehaving:Forgetful"), 0).moe_modules()).router
        assert router.gain.tolist() == [3.0, 3.0]
        assert (router.norm.weight == 1).all()
        assert (router.norm.bias == 0).all()

    def test_an_expert_bias_that_the_router_does_not_have_is_refused(self, example):
        with pytest.raises(ConfigError, match=r"model.expert_bias=True has no meaning"):
            build_model(make_config(router=example, expert_bias=True), 0)
