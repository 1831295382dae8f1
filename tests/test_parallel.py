"""A world of several ranks computes what one process computes on the same global batch.

Shapes: G sequences of the global batch, S tokens of each, T tokens, E experts, K experts a token, V vocabulary.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_ray.config import Config, build_config
from moe_ray.data.batches import MicroBatch
from moe_ray.models.router import Routing
from moe_ray.models.top_k_router import TopKRouter
from moe_ray.models.transformer import Transformer, build_model
from moe_ray.parallel.grads import clip_gradients, reduce_gradients
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.shard import build_sharded_model, expert_parameter_names
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.optimizer import build_optimizer, learning_rate
from moe_ray.training.step import Trainer, accumulate_gradients, train_step
from tests.worlds import run_world

WORLDS = {1: [1], 2: [1, 2], 3: [1, 3], 4: [1, 2, 4]}
STEPS = 3
TOLERANCE = 1e-5


# What differs from the default model in ways that expert parallelism could break.
VARIANTS = {
    "default": {},
    "switch": {"top_k": 1, "route_norm": False, "capacity_factor": 0.7, "activation": "relu", "moe_every": 2},
    "deepseek": {
        "preset": "deepseek_v3",
        "init_std": 0.15,
        "num_kv_heads": 4,
        "q_lora_rank": 16,
        "num_expert_groups": 4,
        "num_limited_groups": 2,
    },
    "gpt_oss": {"preset": "gpt_oss", "head_dim": 16, "sliding_window": 5},
    "expert_choice": {"router": "expert_choice", "activation": "relu2"},
    "hash": {"router": "hash", "load_balancing_scope": "sequence", "num_shared_experts": 1},
    "forced_balance": {"router": "forced_balance", "qk_norm": "full", "activation": "geglu"},
}


def make_config(variant: str = "default") -> Config:
    model = {"vocab_size": 64, "dim": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "num_experts": 12}
    model |= {"top_k": 3, "expert_dim": 16, "dense_dim": 48, "num_dense_layers": 1, "max_sequence_length": 16}
    # Large weights and losses, so that a term that is wrong or missing is far outside the tolerance.
    model |= {"init_std": 0.3, "load_balancing_loss_weight": 0.5, "router_z_loss_weight": 0.1}
    return build_config(
        {
            "model": model | VARIANTS[variant],
            "data": {"sequence_length": 16},
            "optim": {"lr": 1e-2, "warmup_steps": 1, "clip_norm": 0.5, "eps": 1e-4},
            "train": {"steps": 10, "global_batch": 5, "micro_batch": 1},
        }
    )


def global_batch(config: Config, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens_GS = torch.randint(config.model.vocab_size, (config.train.global_batch, 17), generator=generator)
    return tokens_GS[:, :-1], tokens_GS[:, 1:]


def share(config: Config, step: int, rank: int, world_size: int) -> list[MicroBatch]:
    """Round-robin sequences, one a micro-batch, padded with empty ones: shares are uneven or empty."""
    tokens_GS, targets_GS = global_batch(config, step)
    rounds = -(-config.train.global_batch // world_size)
    picks = [slice(i, i + 1) for i in range(rank, rounds * world_size, world_size)]
    return [
        MicroBatch(tokens_GS[pick], targets_GS[pick], torch.zeros(len(tokens_GS[pick]), dtype=torch.int64))
        for pick in picks
    ]


def force_first_experts(model: Transformer) -> None:
    """Every token to experts 0, 1 and 2, so that most ranks of an `ep` group receive nothing."""

    def reroute(router: TopKRouter, _: tuple[Tensor, ...], routing: Routing) -> Routing:
        ids_TK = torch.arange(router.config.top_k).expand_as(routing.expert_ids_TK)
        weights_TK = routing.probs_TE.gather(1, ids_TK)
        return dataclasses.replace(routing, expert_ids_TK=ids_TK, weights_TK=weights_TK)

    for moe in model.moe_modules():
        moe.router.register_forward_hook(reroute)


def one_process(config: Config, forced: bool) -> dict[str, Tensor]:
    """The plain way: the whole batch in one forward pass, losses and clipping by torch alone."""
    model = build_model(config.model, config.train.seed)
    if forced:
        force_first_experts(model)
    optimizer = build_optimizer(model, config.optim)
    record: dict[str, Tensor] = {}
    num_experts = config.model.num_experts
    load_LE = torch.full((len(config.model.moe_layers), num_experts), 1 / num_experts)
    for step in range(STEPS):
        tokens_GS, targets_GS = global_batch(config, step)
        output = model(tokens_GS)
        loss = F.cross_entropy(model.logits(output.hidden_BSD).flatten(0, 1), targets_GS.flatten())
        total = loss
        for load_E, routing in zip(load_LE, output.routings, strict=True):
            total = total + 0.5 * balance(config, routing, load_E)
            if routing.logits_TE is not None:
                total = total + 0.1 * routing.logits_TE.logsumexp(-1).square().mean()
        total.backward()
        load_LE = torch.stack([routing.load() / routing.load().sum() for routing in output.routings])
        for moe, load_E in zip(model.moe_modules(), load_LE, strict=True):
            moe.router.load_fraction_E.copy_(load_E)
        record[f"loss/{step}"] = loss.detach()
        record |= {f"grad/{step}/{name}": p.grad.clone() for name, p in model.named_parameters()}
        record[f"norm/{step}"] = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config.train.steps, config.optim)
        optimizer.step()
        optimizer.zero_grad()
    record["logits"] = model.logits(model(global_batch(config, 99)[0]).hidden_BSD).detach()
    record |= {f"state/{name}": tensor.float() for name, tensor in model.state_dict().items()}
    return record


def balance(config: Config, routing: Routing, load_E: Tensor) -> Tensor:
    """The load-balancing loss without any of the code under test."""
    num_experts = config.model.num_experts
    if config.model.load_balancing_scope == "global_batch":
        return num_experts * (routing.probs_TE.mean(0) * load_E).sum()
    batch = config.train.global_batch
    probs_BE = routing.probs_TE.view(batch, -1, num_experts).mean(1)
    loads_BE = torch.stack([ids.bincount(minlength=num_experts) for ids in routing.expert_ids_TK.view(batch, -1)])
    return num_experts * (probs_BE * loads_BE / loads_BE.sum(1, keepdim=True)).sum(1).mean()


def one_rank(rank: int, ep: int, forced: bool, config: Config, out_dir: Path) -> None:
    mesh = build_mesh(ep)
    clock = PhaseClock(mesh.device)
    model = build_sharded_model(config.model, config.train.seed, mesh, clock)
    if forced:
        force_first_experts(model)
    trainer = Trainer(config, mesh, model, build_optimizer(model, config.optim), clock)
    record: dict[str, Tensor] = {}
    for step in range(STEPS):
        batches = share(config, step, rank, mesh.world_size)
        accumulate_gradients(trainer, batches)
        reduce_gradients(model, mesh)
        record |= {f"grad/{step}/{name}": p.grad.clone() for name, p in model.named_parameters()}
        record[f"norm/{step}"] = clip_gradients(model, mesh, config.optim.clip_norm)
        trainer.optimizer.zero_grad()
        result = train_step(trainer, batches, learning_rate(step, config.train.steps, config.optim))
        record[f"loss/{step}"] = torch.tensor(result.loss, dtype=torch.float32)
        assert result.grad_norm == pytest.approx(float(record[f"norm/{step}"]), rel=1e-5)
    record["logits"] = model.logits(model(global_batch(config, 99)[0]).hidden_BSD).detach()
    record |= {f"state/{name}": tensor.float() for name, tensor in model.state_dict().items()}
    if mesh.dp_rank == 0 or ep == 1:
        save_file(record, out_dir / f"ep{ep}-{rank}.safetensors")


def all_meshes(rank: int, world_size: int, forced: bool, config: Config, out_dir: Path) -> None:
    for ep in WORLDS[world_size]:
        one_rank(rank, ep, forced, config, out_dir)


@pytest.mark.parametrize("forced", [False, True], ids=["routed", "one-expert"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_every_mesh_equals_one_process(world_size: int, forced: bool, tmp_path: Path) -> None:
    assert_meshes_equal_one_process(world_size, make_config(), forced, tmp_path)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "default"])
def test_every_architecture_on_two_ranks_equals_one_process(variant: str, tmp_path: Path) -> None:
    assert_meshes_equal_one_process(2, make_config(variant), forced=False, tmp_path=tmp_path)


def assert_meshes_equal_one_process(world_size: int, config: Config, forced: bool, tmp_path: Path) -> None:
    expected = one_process(config, forced)
    run_world(world_size, all_meshes, world_size, forced, config, tmp_path)
    expert_names = expert_parameter_names(build_model(config.model, 0))
    for ep in WORLDS[world_size]:
        records = [load_file(path) for path in sorted(tmp_path.glob(f"ep{ep}-*"))]
        for name, value in expected.items():
            if name.split("/")[-1] in expert_names and ep > 1:
                actual = torch.cat([record[name] for record in records])
                assert_close(actual, value, name, ep)
            else:
                for record in records:
                    assert_close(record[name], value, name, ep)


def assert_close(actual: Tensor, expected: Tensor, name: str, ep: int) -> None:
    error = (actual - expected).norm() / expected.norm().clamp(min=1e-12)
    assert error < TOLERANCE, f"{name} with ep={ep} is off by {error:.2e} relative"
