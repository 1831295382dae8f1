"""The MoE layer against a per-token loop and transformers, its losses and its cost model against known numbers.

Shapes: B batch, S sequence, T tokens (B*S), D model dim, E experts, K experts a token, F expert hidden dim,
G = 2 * F, N = T * K.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ray.config import ModelConfig
from moe_ray.models.losses import load_balancing_loss, router_z_loss
from moe_ray.models.moe import MoE
from moe_ray.models.permute import group_by_expert, pad_groups, permute, unpermute
from moe_ray.models.router import Routing

DIM, HIDDEN = 16, 24


pytestmark = pytest.mark.usefixtures("one_thread")


def make_moe(num_experts: int, top_k: int, route_norm: bool = True, seed: int = 0) -> MoE:
    """A small layer with weights large enough that gates are far from linear."""
    config = ModelConfig(
        dim=DIM, expert_dim=HIDDEN, num_experts=num_experts, top_k=top_k, route_norm=route_norm, num_heads=2
    )
    generator = torch.Generator().manual_seed(seed)
    moe = MoE(config)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0.0, 0.5, generator=generator)
    return moe


def make_input(num_tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, num_tokens, DIM, generator=generator).requires_grad_()


def run(moe: MoE, x_BSD: Tensor) -> tuple[Tensor, Routing]:
    """The layer on tokens whose ids do not matter."""
    return moe(x_BSD, torch.zeros(x_BSD.shape[:2], dtype=torch.int64))


def loop_moe(moe: MoE, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of the layer, token by token and expert by expert: output and routing weights [T, K]."""
    x_TD = x_BTD[0]
    y_TD = x_TD * 0.0
    probs_TE = F.linear(x_TD, moe.router.weight).softmax(dim=-1)
    chosen = probs_TE.topk(moe.config.top_k, dim=-1)
    weights_TK = chosen.values
    if moe.config.route_norm:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    for t, expert_ids in enumerate(chosen.indices.tolist()):
        for k, expert in enumerate(expert_ids):
            w_gate_FD, w_up_FD = moe.experts.w_in_eGD[expert].chunk(2)
            a_F = F.silu(w_gate_FD @ x_TD[t]) * (w_up_FD @ x_TD[t])
            y_1D = (weights_TK[t, k] * (moe.experts.w_out_eDF[expert] @ a_F)).unsqueeze(0)
            y_TD = y_TD.index_add(0, torch.tensor([t]), y_1D)
    return y_TD.unsqueeze(0), weights_TK


def assert_like_loop(moe: MoE, x_BTD: Tensor) -> None:
    """Equal outputs and gradients with respect to input, all weights and the routing weights."""
    y_BTD, routing = run(moe, x_BTD)
    expected_BTD, expected_weights_TK = loop_moe(moe, x_BTD)
    torch.testing.assert_close(y_BTD, expected_BTD, atol=1e-5, rtol=1e-4)
    grad_BTD = torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(2))
    parameters = [x_BTD, *moe.parameters()]
    grads = torch.autograd.grad(y_BTD, [*parameters, routing.weights_TK], grad_BTD)
    expected = torch.autograd.grad(
        expected_BTD, [*parameters, expected_weights_TK], grad_BTD, allow_unused=True, materialize_grads=True
    )
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("route_norm", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "top_k", "num_tokens"),
    [(1, 1, 5), (4, 2, 17), (8, 1, 1), (8, 3, 0), (16, 8, 5), (32, 2, 3), (4, 4, 9), (8, 8, 20)],
)
def test_layer_equals_a_loop_over_tokens(num_experts, top_k, num_tokens, route_norm):
    assert_like_loop(make_moe(num_experts, top_k, route_norm), make_input(num_tokens))


def test_layer_equals_a_loop_when_all_tokens_choose_one_expert():
    moe, x_BTD = make_moe(8, 1), make_input(12)
    with torch.no_grad():
        x_BTD.abs_()
        moe.router.weight[5] = 3.0
    assert run(moe, x_BTD)[1].tokens_per_expert().tolist() == [0, 0, 0, 0, 0, 12, 0, 0]
    assert_like_loop(moe, x_BTD)


def test_experts_without_tokens_get_zero_gradients():
    moe, x_BTD = make_moe(32, 2), make_input(3)
    y_BTD, routing = run(moe, x_BTD)
    y_BTD.sum().backward()
    idle_E = routing.tokens_per_expert() == 0
    assert idle_E.sum() >= 26
    for weight in (moe.experts.w_in_eGD, moe.experts.w_out_eDF):
        busy_E = weight.grad.flatten(1).abs().sum(1) > 0
        assert torch.equal(busy_E, ~idle_E)


def test_layer_takes_non_contiguous_input_and_gradient():
    moe = make_moe(8, 3)
    x_BSD = torch.randn(2, 15, DIM)[:, ::2].requires_grad_()
    grad_BSD = torch.randn(DIM, 2, 8).permute(1, 2, 0)
    assert not x_BSD.is_contiguous()
    y_BSD = run(moe, x_BSD)[0]
    expected_BSD = run(moe, x_BSD.contiguous())[0]
    assert torch.equal(y_BSD, expected_BSD)
    inputs = [x_BSD, *moe.parameters()]
    grads = torch.autograd.grad(y_BSD, inputs, grad_BSD)
    expected = torch.autograd.grad(expected_BSD, inputs, grad_BSD.contiguous())
    torch.testing.assert_close(grads, expected)


def test_bfloat16_layer_is_close_to_float32_and_keeps_the_dtype():
    moe, x_BTD = make_moe(8, 2), make_input(100)
    with torch.no_grad():
        # Values that bfloat16 holds exactly, so that both layers route alike.
        for tensor in (x_BTD, *moe.parameters()):
            tensor.copy_(tensor.bfloat16())
    expected_BTD, routing = run(moe, x_BTD)
    expected_BTD.square().sum().backward()
    low = make_moe(8, 2).to(torch.bfloat16)
    low.load_state_dict(moe.state_dict())
    low_x_BTD = x_BTD.detach().bfloat16().requires_grad_()
    y_BTD, low_routing = run(low, low_x_BTD)
    assert y_BTD.dtype == torch.bfloat16
    assert low_routing.weights_TK.dtype == low_routing.logits_TE.dtype == torch.float32
    assert torch.equal(low_routing.expert_ids_TK, routing.expert_ids_TK)
    y_BTD.float().square().sum().backward()
    pairs = [(y_BTD, expected_BTD), (low_x_BTD.grad, x_BTD.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(low.parameters(), moe.parameters(), strict=True)]
    for value, expected in pairs:
        assert (value.float() - expected).norm() < 0.02 * expected.norm()


def test_autocast_computes_experts_in_bfloat16_and_routes_in_float32():
    moe, x_BTD = make_moe(8, 2), make_input(100)
    expected_BTD, expected_routing = run(moe, x_BTD)
    with torch.autocast("cpu", torch.bfloat16):
        y_BTD, routing = run(moe, x_BTD)
    assert y_BTD.dtype == torch.bfloat16
    assert torch.equal(routing.logits_TE, expected_routing.logits_TE)
    assert 1e-4 < (y_BTD.float() - expected_BTD).norm() / expected_BTD.norm() < 0.02
    y_BTD.float().sum().backward()
    assert {parameter.grad.dtype for parameter in (x_BTD, *moe.parameters())} == {torch.float32}


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (16, 8)])
def test_layer_equals_mixtral_of_transformers(num_experts, top_k):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    block: Any = MixtralSparseMoeBlock(
        transformers.MixtralConfig(
            hidden_size=DIM,
            intermediate_size=HIDDEN,
            num_local_experts=num_experts,
            num_experts_per_tok=top_k,
            experts_implementation="eager",
        )
    )
    moe, x_BTD = make_moe(num_experts, top_k), make_input(50)
    with torch.no_grad():
        block.gate.weight.copy_(moe.router.weight)
        block.experts.gate_up_proj.copy_(moe.experts.w_in_eGD)
        block.experts.down_proj.copy_(moe.experts.w_out_eDF)
    y_BTD, expected_BTD = run(moe, x_BTD)[0], block(x_BTD)
    torch.testing.assert_close(y_BTD, expected_BTD, atol=1e-5, rtol=1e-4)
    grad_BTD = torch.randn_like(y_BTD)
    ours = [x_BTD, moe.router.weight, moe.experts.w_in_eGD, moe.experts.w_out_eDF]
    theirs = [x_BTD, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj]
    grads = torch.autograd.grad(y_BTD, ours, grad_BTD)
    for grad, expected in zip(grads, torch.autograd.grad(expected_BTD, theirs, grad_BTD), strict=True):
        torch.testing.assert_close(grad, expected, atol=2e-5, rtol=1e-4)


def test_routing_weights_sum_to_one_only_with_route_norm():
    normed, plain = (run(make_moe(8, 3, route_norm=flag), make_input(30))[1] for flag in (True, False))
    torch.testing.assert_close(normed.weights_TK.sum(-1), torch.ones(30))
    assert torch.equal(plain.weights_TK, plain.probs_TE.gather(1, plain.expert_ids_TK))
    assert (plain.weights_TK.sum(-1) < 0.999).any()
    assert (plain.weights_TK.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(plain.probs_TE, plain.logits_TE.softmax(-1))


def test_extreme_logits_give_finite_outputs_losses_and_gradients():
    moe, x_BTD = make_moe(8, 2), make_input(30)
    with torch.no_grad():
        moe.router.weight.mul_(1e4)
        x_BTD[0, :10] *= 1e3
        x_BTD[0, 10] = 0.0
    y_BTD, routing = run(moe, x_BTD)
    assert routing.logits_TE.abs().max() > 1e6
    loss = y_BTD.square().mean() + router_z_loss(routing.logits_TE, 30)
    loss = loss + load_balancing_loss(routing.probs_TE, torch.full((8,), 1 / 8), 30)
    loss.backward()
    for tensor in (loss, y_BTD, x_BTD.grad, *(parameter.grad for parameter in moe.parameters())):
        assert tensor.isfinite().all()


def test_load_balancing_loss_by_hand():
    probs_TE = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    # sum_t p = (.8, .8, .4); with f: .4 + .2 + .1 = .7; times E / tokens = 3 / 2.
    loss = load_balancing_loss(probs_TE, torch.tensor([0.5, 0.25, 0.25]), num_tokens=2)
    assert loss.item() == pytest.approx(1.05)
    uniform = load_balancing_loss(torch.full((4, 8), 1 / 8), torch.full((8,), 1 / 8), num_tokens=4)
    assert uniform.item() == pytest.approx(1.0)
    # Everything on one expert of eight costs E.
    collapsed = load_balancing_loss(torch.eye(8)[:1].repeat(4, 1), torch.eye(8)[0], num_tokens=4)
    assert collapsed.item() == pytest.approx(8.0)


def test_router_z_loss_by_hand():
    # log-sum-exp of (0, 0) is ln 2 and of (ln 3, 0) is ln 4: (.480453 + 1.921812) / 2.
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert router_z_loss(logits_TE, num_tokens=2).item() == pytest.approx(1.2011325)
    # Half of a global batch of 4 tokens.
    assert router_z_loss(logits_TE, num_tokens=4).item() == pytest.approx(0.6005663)


def test_grouping_sorts_by_expert_and_is_stable():
    permutation = group_by_expert(torch.tensor([[2, 0], [0, 1], [2, 1]]))
    assert permutation.order_N.tolist() == [1, 2, 3, 5, 0, 4]
    assert permutation.inverse_TK.tolist() == [[4, 0], [1, 2], [5, 3]]


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_permute_and_unpermute_equal_autograd_indexing(top_k):
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(13, 10, generator=generator).topk(top_k).indices
    permutation = group_by_expert(ids_TK)
    x_TD = torch.randn(13, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weights_TK = torch.rand(13, top_k, dtype=torch.float64, generator=generator).requires_grad_()
    x_ND = permute(x_TD, permutation)
    assert torch.equal(x_ND, x_TD[permutation.order_N // top_k])
    y_ND = (x_ND * torch.arange(1, 13 * top_k + 1)[:, None]).sin()
    y_TD = unpermute(y_ND, weights_TK, permutation)
    expected_TD = (y_ND[permutation.inverse_TK] * weights_TK[..., None]).sum(1)
    torch.testing.assert_close(y_TD, expected_TD)
    # Expanded and transposed gradients, as sum() and later layers hand down.
    for grad_TD in (
        torch.ones(1, 1, dtype=torch.float64).expand(13, 6),
        torch.randn(6, 13, dtype=torch.float64).t(),
    ):
        grads = torch.autograd.grad(y_TD, [x_TD, weights_TK], grad_TD, retain_graph=True)
        expected = torch.autograd.grad(expected_TD, [x_TD, weights_TK], grad_TD, retain_graph=True)
        torch.testing.assert_close(grads, expected)
    assert torch.autograd.gradcheck(
        lambda x, w: unpermute(permute(x, permutation).cos(), w, permutation), (x_TD, weights_TK)
    )


def test_padding_makes_groups_multiples_of_16_and_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.rand(40, 6, generator=generator)[:, :5].topk(3).indices
    tokens_per_expert_E = torch.bincount(ids_TK.flatten(), minlength=6)
    assert tokens_per_expert_E[5] == 0
    plain = group_by_expert(ids_TK)
    padded, lengths_E = pad_groups(plain, tokens_per_expert_E, torch.empty(0, dtype=torch.bfloat16))
    assert lengths_E.tolist() == [-(-count // 16) * 16 for count in tokens_per_expert_E.tolist()]
    rows_by_expert = padded.order_N.split(lengths_E.tolist())
    for expert, rows in enumerate(rows_by_expert):
        used = int(tokens_per_expert_E[expert])
        assert (ids_TK.flatten()[rows[:used]] == expert).all()
        assert (rows[used:] == -1).all()
    assert torch.equal(padded.order_N[padded.inverse_TK].flatten(), torch.arange(120))

    x_TD = torch.randn(40, 6, dtype=torch.float64, generator=generator).requires_grad_()
    weights_TK = torch.rand(40, 3, dtype=torch.float64, generator=generator).requires_grad_()
    scale_D = torch.ones(6, dtype=torch.float64, requires_grad=True)
    grad_TD = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    results = []
    for permutation in (plain, padded):
        # The scale sees every row, padding included.
        y_TD = unpermute((permute(x_TD, permutation) * scale_D).exp(), weights_TK, permutation)
        results.append((y_TD, *torch.autograd.grad(y_TD, [x_TD, weights_TK, scale_D], grad_TD)))
    torch.testing.assert_close(results[1], results[0])


def test_only_large_bfloat16_batches_are_padded():
    ids_TK = torch.arange(64).view(32, 2) % 4
    permutation, counts_E = group_by_expert(ids_TK), torch.full((4,), 16)
    for dtype, experts in ((torch.float32, 4), (torch.bfloat16, 5)):
        lengths_E = torch.cat((counts_E, torch.zeros(experts - 4, dtype=torch.int64)))
        same, same_E = pad_groups(permutation, lengths_E, torch.empty(0, dtype=dtype))
        assert same is permutation
        assert same_E is lengths_E


def test_unpermute_with_unit_weights_undoes_a_padded_permute():
    ids_R1 = (torch.arange(100) % 3).unsqueeze(1)
    counts_E = torch.bincount(ids_R1.flatten())
    permutation, _ = pad_groups(group_by_expert(ids_R1), counts_E, torch.empty(0, dtype=torch.bfloat16))
    x_RD = torch.randn(100, 5).requires_grad_()
    y_RD = unpermute(permute(x_RD, permutation), torch.ones(100, 1), permutation)
    assert torch.equal(y_RD, x_RD)
    grad_RD = torch.randn(100, 5)
    assert torch.equal(*torch.autograd.grad(y_RD, [x_RD], grad_RD), grad_RD)
