"""Activations of an unbalanced micro-batch are bounded, and bounding them changes no result.

Shapes: R rows at experts, D model dim, e local experts, T local tokens, K experts a token, p ranks.
"""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_ray.config import ModelConfig, ParallelConfig
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.moe import MoE
from moe_ray.models.router import Routing
from moe_ray.models.transformer import Transformer, build_model
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.telemetry.clock import PhaseClock
from tests.worlds import run_world

DIM, HIDDEN = 16, 24
_UNBOUNDED = 1000.0
ACTIVATIONS = ("swiglu", "swigluoai", "geglu", "gelu", "relu", "relu2")
COUNTS = {
    "uneven": [7, 0, 13, 1, 0],
    "one expert": [0, 0, 21, 0, 0],
    "even": [4, 4, 4, 4, 4],
    "no rows": [0, 0, 0, 0, 0],
}


def experts_with(activation: str, has_bias: bool, num_experts: int = 5) -> GroupedExperts:
    torch.manual_seed(0)
    config = ModelConfig(
        dim=DIM,
        num_heads=2,
        num_experts=num_experts,
        expert_dim=HIDDEN,
        activation=activation,
        expert_ffn_bias=has_bias,
    )
    experts = GroupedExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return experts


def run_experts(experts: GroupedExperts, counts: list[int], max_kept_rows: int | None) -> list[Tensor]:
    """Output, and the gradients of the input and of each parameter."""
    generator = torch.Generator().manual_seed(1)
    x_RD = torch.randn(sum(counts), DIM, generator=generator, requires_grad=True)
    y_RD = experts(x_RD, torch.tensor(counts), max_kept_rows)
    weights_RD = torch.randn(y_RD.shape, generator=generator)
    return [y_RD, *torch.autograd.grad((y_RD * weights_RD).sum(), [x_RD, *experts.parameters()])]


@pytest.mark.parametrize("max_kept_rows", [1, 4, 10, 20, 21, 100])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bounding_changes_no_result(
    activation: str, has_bias: bool, counts: list[int], max_kept_rows: int
) -> None:
    experts = experts_with(activation, has_bias)
    expected = run_experts(experts, counts, None)
    for actual, wanted in zip(run_experts(experts, counts, max_kept_rows), expected, strict=True):
        assert (actual - wanted).norm() <= 1e-6 * wanted.norm()


def test_only_the_bounded_rows_keep_hidden_activations() -> None:
    rows = 64
    experts = experts_with("swiglu", has_bias=False, num_experts=4)
    x_RD = torch.randn(rows, DIM, requires_grad=True)
    kept = {}
    for max_kept_rows in (None, 1, 16, 24, 63, 64):
        with kept_storages(experts) as storages:
            experts(x_RD, torch.tensor([1, 0, 40, 23]), max_kept_rows)
        kept[max_kept_rows] = sum(storages.values()) - x_RD.nbytes
    row_bytes = 3 * HIDDEN * 4
    ends_bytes = 4 * 4
    for max_kept_rows, num_bytes in kept.items():
        chunks = 1 if max_kept_rows is None else math.ceil(rows / max_kept_rows)
        assert num_bytes == min(rows, max_kept_rows or rows) * row_bytes + chunks * ends_bytes


def test_backward_peak_does_not_grow_with_the_rows() -> None:
    """What the experts allocate beside rows of width D; the profiler sees every allocation of the CPU."""
    wide = 1024
    torch.manual_seed(0)
    experts = GroupedExperts(ModelConfig(dim=8, num_heads=1, num_kv_heads=1, num_experts=2, expert_dim=wide))
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    peaks = {
        rows: {bound: peak_bytes(experts, rows, bound) for bound in (None, 64)} for rows in (64, 128, 256, 512)
    }
    assert peaks[512][None] > 6 * peaks[64][None]
    assert peaks[512][64] < 1.5 * peaks[64][None]


def peak_bytes(experts: GroupedExperts, rows: int, max_kept_rows: int | None) -> int:
    x_RD = torch.randn(rows, 8, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        experts(x_RD, torch.tensor([rows - 3, 3]), max_kept_rows).sum().backward()
    for parameter in experts.parameters():
        parameter.grad = None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def kept_storages(module: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of each storage that autograd keeps for the backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


MODEL = ModelConfig(
    vocab_size=64,
    dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    num_experts=8,
    top_k=2,
    expert_dim=128,
    max_sequence_length=32,
    init_std=0.2,
)
FACTOR = 1.5


def send_to(model: Transformer, experts: int) -> None:
    """Every token to two of the first `experts` experts, evenly."""

    def reroute(_: torch.nn.Module, __: tuple[Tensor, ...], routing: Routing) -> Routing:
        num_tokens, top_k = routing.expert_ids_TK.shape
        ids_TK = (torch.arange(num_tokens * top_k) % experts).view(num_tokens, top_k)
        weights_TK = routing.probs_TE.gather(1, ids_TK)
        return dataclasses.replace(routing, expert_ids_TK=ids_TK, weights_TK=weights_TK)

    for moe in model.moe_modules():
        moe.router.register_forward_hook(reroute)


def step(model: Transformer, tokens_BS: Tensor) -> dict[str, Tensor]:
    hidden_BSD = model(tokens_BS).hidden_BSD
    model.logits(hidden_BSD).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def one_rank(rank: int, shares: list[int], experts: int, factor: float | None, out_dir: Path) -> None:
    mesh = build_mesh(len(shares))
    parallel = ParallelConfig(dispatch_buffer_factor=factor or _UNBOUNDED)
    model = build_sharded_model(MODEL, 0, mesh, PhaseClock(mesh.device), parallel)
    send_to(model, experts)
    kept = []

    def count(moe: MoE) -> None:
        inner = moe.experts.forward

        def forward(*arguments: object) -> Tensor:
            with kept_storages(moe.experts) as storages:
                y_RD = inner(*arguments)
            kept.append(sum(storages.values()))
            return y_RD

        moe.experts.forward = forward

    for moe in model.moe_modules():
        count(moe)
    gradients = step(model, global_batch(shares).split(shares)[rank])
    save_file(gradients | {"kept": torch.tensor(kept)}, out_dir / f"{rank}.safetensors")


def global_batch(shares: list[int]) -> Tensor:
    return torch.randint(64, (sum(shares), 32), generator=torch.Generator().manual_seed(5))


def on_ranks(shares: list[int], experts: int, factor: float | None, out_dir: Path) -> list[dict[str, Tensor]]:
    out_dir.mkdir()
    run_world(len(shares), one_rank, shares, experts, factor, out_dir)
    return [load_file(out_dir / f"{rank}.safetensors") for rank in range(len(shares))]


@pytest.mark.parametrize("shares", [[4, 4, 4, 4], [0, 5, 4, 5]], ids=["even", "first rank has no tokens"])
def test_ranks_under_imbalance_compute_what_one_process_does(shares: list[int], tmp_path: Path) -> None:
    model = build_model(MODEL, 0)
    send_to(model, 2)
    expected = step(model, global_batch(shares))
    ranks = on_ranks(shares, 2, FACTOR, tmp_path / "bounded")
    for name, gradient in expected.items():
        is_expert = "experts" in name
        parts = [rank[name] for rank in ranks if name in rank]
        actual = torch.cat(parts) if is_expert else torch.stack(parts).sum(0)
        assert (actual - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_kept_bytes_are_bounded_on_the_rank_that_gets_everything(tmp_path: Path) -> None:
    shares = [2, 2, 2, 2]
    balanced_rows = 2 * 32 * MODEL.top_k
    kept = {
        (imbalance, factor): on_ranks(shares, 8 // imbalance, factor, tmp_path / f"{imbalance}-{factor}")[0][
            "kept"
        ]
        for imbalance in (1, 2, 4)
        for factor in (None, FACTOR)
    }
    for imbalance in (1, 2, 4):
        without, bounded = int(kept[imbalance, None].max()), int(kept[imbalance, FACTOR].max())
        rows = imbalance * balanced_rows
        print(f"imbalance {imbalance}x: {rows} rows, kept {without:,} bytes without a bound, {bounded:,} with it")
        inputs = rows * MODEL.dim * 4
        per_row = 3 * MODEL.expert_dim * 4
        assert without == pytest.approx(inputs + rows * per_row, rel=1e-3)
        assert bounded == pytest.approx(inputs + min(rows, FACTOR * balanced_rows) * per_row, rel=1e-3)
