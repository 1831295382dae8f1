"""Who takes part in `train_step.py`: our trainer, transformers, a dense model, one multiplication.

Shapes: B sequences, S tokens of each, V vocabulary.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ray.config import Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from moe_ray.data.batches import MicroBatch
from moe_ray.models.transformer import build_model
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.optimizer import build_optimizer
from moe_ray.training.step import Trainer, train_step

GEMM_SIZE = 2048
LR = 1e-4
Step = Callable[[Tensor], float]
_THEIR_NAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^(norm|layers)\.", r"model.\1."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.w(\w)\.", r".self_attn.\1_proj."),
    (r"\.ffn\.router\.", ".mlp.gate."),
    (r"\.ffn\.experts\.w_in_\w+", ".mlp.experts.gate_up_proj"),
    (r"\.ffn\.experts\.w_out_\w+", ".mlp.experts.down_proj"),
)


@dataclass(frozen=True)
class Case:
    """What all contestants of a comparison share."""

    model: ModelConfig
    dtype: str
    sequences: int
    sequence_length: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * self.sequence_length

    def batch(self, number: int) -> Tensor:
        """Token ids, [B, S + 1], of step `number`; as in text, few of them are frequent (Zipf)."""
        generator = torch.Generator().manual_seed(number)
        frequencies_V = 1 / torch.arange(10, self.model.vocab_size + 10)
        size = self.sequences * (self.sequence_length + 1)
        return torch.multinomial(frequencies_V, size, True, generator=generator).view(self.sequences, -1)


def contestant_model(name: str, config: ModelConfig) -> ModelConfig:
    """The architecture that this contestant trains."""
    if name == "dense":
        # A copy is not validated, and a valid configuration has at least one MoE layer.
        width = config.top_k * config.expert_dim
        return config.model_copy(update={"num_dense_layers": config.num_layers, "dense_dim": width})
    if name == "balanced":
        return config.model_copy(update={"router": "forced_balance"})
    return config


def our_step(case: Case, config: ModelConfig, ranks: int) -> Step:
    """`train_step` of this rank; returns the global loss."""
    mesh = build_mesh(ep=ranks)
    clock = PhaseClock(mesh.device, enabled=False)
    whole = Config(
        data=DataConfig(sequence_length=case.sequence_length),
        train=TrainConfig(global_batch=case.sequences, micro_batch=case.sequences, dtype=case.dtype),
    ).model_copy(update={"model": config})
    model = build_sharded_model(config, 0, mesh, clock)
    trainer = Trainer(whole, mesh, model, build_optimizer(model, whole.optim), clock)

    def step(windows: Tensor) -> float:
        mine = windows.tensor_split(ranks)[mesh.rank]
        domains_B = torch.zeros(len(mine), dtype=torch.int64)
        micro_batch = MicroBatch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous(), domains_B)
        return train_step(trainer, [micro_batch], LR).loss

    return step


def their_step(case: Case) -> Step:
    """The usual loop around transformers' model; returns the loss."""
    model = their_model(case.model, case.sequence_length)
    optim = OptimConfig()
    optimizer = torch.optim.AdamW(
        model.parameters(), LR, (optim.beta1, optim.beta2), optim.eps, optim.weight_decay, fused=True
    )

    def step(windows: Tensor) -> float:
        targets_BS = windows[:, 1:].contiguous()
        with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bfloat16"):
            loss = model(windows[:, :-1], labels=targets_BS, shift_labels=targets_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def their_model(config: ModelConfig, sequence_length: int) -> Any:
    """MixtralForCausalLM with the weights of `build_model(config, 0)`."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.expert_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "max_position_embeddings": sequence_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "attn_implementation": "sdpa",
        "experts_implementation": "grouped_mm",
    }
    theirs: Any = MixtralForCausalLM(MixtralConfig(**settings))
    weights = {}
    for name, parameter in build_model(config, 0).named_parameters():
        for pattern, replacement in _THEIR_NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = parameter.detach()
    theirs.load_state_dict(weights)
    return theirs


def gemm_step(dtype: str) -> Step:
    """One large multiplication."""
    left, right, out = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=getattr(torch, dtype)) for _ in range(3))

    def step(_: Tensor) -> float:
        torch.mm(left, right, out=out)
        return 0.0

    return step


def make_step(name: str, case: Case, ranks: int) -> Step:
    """The step of a contestant, as the present rank of `ranks` takes it."""
    if name == "gemm":
        return gemm_step(case.dtype)
    if name == "transformers":
        return their_step(case)
    return our_step(case, contestant_model(name, case.model), ranks)
