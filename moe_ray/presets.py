"""Architectures by name: the settings in which each differs from the defaults.

A preset says what kind of model it is; how large is for `dim`, `num_layers` and the rest to say. Whatever is set
beside a preset wins over it.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # The default model: top-2 of 8 SwiGLU experts in every layer, dropless.
    "basic": {},
    # Every setting at its default, for an architecture that has no name.
    "custom": {},
    # Fedus et al. 2021: one expert a token and a bounded number of tokens an expert, in every other layer.
    "switch": {
        "top_k": 1,
        "route_norm": False,
        "capacity_factor": 1.25,
        "eval_capacity_factor": 2.0,
        "router_jitter": 0.01,
        "router_z_loss_weight": 0.0,
        "moe_every": 2,
        "activation": "relu",
        "dense_dim": 256,
    },
    # Jiang et al. 2024
    "mixtral": {
        "load_balancing_loss_weight": 0.02,
        "router_z_loss_weight": 0.0,
        "rope_theta": 1e6,
        "tie_embeddings": False,
    },
    # Du et al. 2021: two experts a token in every other layer.
    "glam": {"num_experts": 64, "expert_dim": 64, "moe_every": 2, "activation": "geglu", "dense_dim": 256},
    # Muennighoff et al. 2024
    "olmoe": {
        "num_experts": 64,
        "top_k": 8,
        "expert_dim": 64,
        "route_norm": False,
        "qk_norm": "full",
        "tie_embeddings": False,
    },
    # Yang et al. 2025; global-batch balancing
    "qwen3_moe": {
        "num_experts": 64,
        "top_k": 8,
        "expert_dim": 64,
        "qk_norm": "head",
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "load_balancing_loss_weight": 0.001,
        "router_z_loss_weight": 0.0,
        "tie_embeddings": False,
    },
    # DeepSeek-AI 2024: latent attention, a shared expert, balancing by biases instead of a loss
    "deepseek_v3": {
        "attention": "mla",
        "q_lora_rank": 128,
        "num_experts": 64,
        "top_k": 8,
        "expert_dim": 64,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "score_func": "sigmoid",
        "route_scale": 2.5,
        "expert_bias": True,
        "num_expert_groups": 8,
        "num_limited_groups": 4,
        "load_balancing_scope": "sequence",
        "load_balancing_loss_weight": 1e-4,
        "router_z_loss_weight": 0.0,
        "norm_eps": 1e-6,
        "tie_embeddings": False,
    },
    # OpenAI 2025: attention sinks, every other layer with a sliding window, biases everywhere
    "gpt_oss": {
        "num_experts": 32,
        "top_k": 4,
        "expert_dim": 128,
        "softmax_after_top_k": True,
        "router_bias": True,
        "expert_ffn_bias": True,
        "activation": "swigluoai",
        "attention_bias": True,
        "attention_sinks": True,
        "sliding_window": 128,
        "full_attention_every": 2,
        "rope_theta": 150_000.0,
        "load_balancing_loss_weight": 0.001,
        "router_z_loss_weight": 0.0,
        "tie_embeddings": False,
    },
}
