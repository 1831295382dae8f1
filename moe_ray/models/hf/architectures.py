"""The Hugging Face architectures that we read and write: which key of config.json is which of our settings.

Keys are those of published files and of what `transformers` saves. Whatever a config.json says beyond them is
refused, unless it is known to leave the model's output alone.
"""

from dataclasses import dataclass, field
from typing import Any

_SHARED_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
}
_SHARED_DEFAULTS = {"tie_word_embeddings": False, "initializer_range": 0.02, "num_key_value_heads": None}
# Side of the square blocks of a float8 matrix that share a scale (DeepSeek-V3).
FP8_BLOCK = 128
# What the rotary positions, windows and kinds of layers are written with; `config` reads them by functions.
ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})
# Of no effect on the output: names, types, token ids, and what only training uses.
IGNORED_KEYS = frozenset(
    {
        *("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "auto_map"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp"),
        *(
            "attention_dropout",
            "output_router_logits",
            "router_aux_loss_coef",
            "router_jitter_noise",
            "aux_loss_alpha",
        ),
        *(
            "seq_aux",
            "ep_size",
            "num_nextn_predict_layers",
            "num_mtp_layers",
            "max_window_layers",
            "is_llama_config",
        ),
        *("experts_per_token", "initial_context_length", "transformers.js_config", "quantization_config"),
    }
)


@dataclass(frozen=True)
class Architecture:
    """How one `model_type` is written.

    Attributes:
        name: its `model_type`; if it is Mixture-of-Experts, also the name of our preset.
        model_class: its class in `transformers`.
        keys: config.json key to our setting.
        defaults: what `transformers` takes for a key that is left out; other keys are required.
        implied: settings of ours that the class always has.
        constants: values that a key may have; the first is what we write.
        special_keys: keys that `config` reads by functions of their own.
        rope_theta: base of the rotary frequencies if config.json names none.
        router: module of the router in a layer; None: the architecture is dense.
        expert: module of one expert in a layer, with its number as `{}`, which a dense feed-forward has not;
            None: all experts are in one tensor.
        projections: modules of gate, up and down projection of an expert.
    """

    name: str
    model_class: str
    keys: dict[str, str]
    defaults: dict[str, Any] = field(default_factory=dict)
    implied: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    special_keys: frozenset[str] = frozenset()
    rope_theta: float = 10_000.0
    router: str | None = "mlp.gate"
    expert: str | None = "mlp.experts.{}"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", _SHARED_KEYS | self.keys)
        object.__setattr__(self, "defaults", _SHARED_DEFAULTS | self.defaults)
        object.__setattr__(self, "constants", {"hidden_act": ("silu",)} | self.constants)


MIXTRAL = Architecture(
    name="mixtral",
    model_class="MixtralForCausalLM",
    keys={
        "head_dim": "head_dim",
        "intermediate_size": "expert_dim",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "top_k",
        "sliding_window": "sliding_window",
    },
    defaults={"head_dim": None, "sliding_window": None, "rms_norm_eps": 1e-5},
    rope_theta=1e6,
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}",
    projections=("w1", "w3", "w2"),
)
OLMOE = Architecture(
    name="olmoe",
    model_class="OlmoeForCausalLM",
    keys={
        "intermediate_size": "expert_dim",
        "num_experts": "num_experts",
        "num_experts_per_tok": "top_k",
        "norm_topk_prob": "route_norm",
        "attention_bias": "attention_bias",
        "clip_qkv": "clip_qkv",
    },
    defaults={"norm_topk_prob": False, "attention_bias": False, "clip_qkv": None, "rms_norm_eps": 1e-5},
    implied={"qk_norm": "full"},
)
QWEN3_MOE = Architecture(
    name="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    keys={
        "head_dim": "head_dim",
        "intermediate_size": "dense_dim",
        "moe_intermediate_size": "expert_dim",
        "num_experts": "num_experts",
        "num_experts_per_tok": "top_k",
        "norm_topk_prob": "route_norm",
        "attention_bias": "attention_bias",
    },
    defaults={"head_dim": None, "norm_topk_prob": False, "attention_bias": False, "rms_norm_eps": 1e-6},
    implied={"qk_norm": "head"},
    special_keys=frozenset({"use_sliding_window", "sliding_window", "decoder_sparse_step", "mlp_only_layers"}),
)
DEEPSEEK_V3 = Architecture(
    name="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    keys={
        "intermediate_size": "dense_dim",
        "moe_intermediate_size": "expert_dim",
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "num_experts_per_tok": "top_k",
        "norm_topk_prob": "route_norm",
        "routed_scaling_factor": "route_scale",
        "n_group": "num_expert_groups",
        "topk_group": "num_limited_groups",
        "first_k_dense_replace": "num_dense_layers",
        "q_lora_rank": "q_lora_rank",
        "kv_lora_rank": "kv_lora_rank",
        "qk_nope_head_dim": "qk_nope_head_dim",
        "qk_rope_head_dim": "qk_rope_head_dim",
        "v_head_dim": "v_head_dim",
        "rope_interleave": "rope_interleaved",
        "attention_bias": "attention_bias",
    },
    defaults={"rope_interleave": True, "attention_bias": False, "norm_topk_prob": True},
    implied={"attention": "mla", "score_func": "sigmoid", "expert_bias": True},
    constants={
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    special_keys=frozenset({"head_dim", "qk_head_dim"}),
)
GPT_OSS = Architecture(
    name="gpt_oss",
    model_class="GptOssForCausalLM",
    keys={
        "head_dim": "head_dim",
        "intermediate_size": "expert_dim",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "top_k",
        "attention_bias": "attention_bias",
        "swiglu_alpha": "swiglu_alpha",
        "swiglu_limit": "swiglu_limit",
    },
    defaults={
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
    implied={
        "attention_sinks": True,
        "router_bias": True,
        "expert_ffn_bias": True,
        "softmax_after_top_k": True,
        "activation": "swigluoai",
    },
    special_keys=frozenset({"sliding_window", "layer_types"}),
    rope_theta=150_000.0,
    router="mlp.router",
    expert=None,
)
ARCHITECTURES = {a.name: a for a in (MIXTRAL, QWEN3_MOE, OLMOE, DEEPSEEK_V3, GPT_OSS)}

LLAMA = Architecture(
    name="llama",
    model_class="LlamaForCausalLM",
    keys={"head_dim": "head_dim", "intermediate_size": "dense_dim", "attention_bias": "attention_bias"},
    defaults={"head_dim": None, "attention_bias": False},
    constants={"mlp_bias": (False,), "rope_interleaved": (False,)},
    router=None,
    expert="mlp",
)
QWEN3 = Architecture(
    name="qwen3",
    model_class="Qwen3ForCausalLM",
    keys={"head_dim": "head_dim", "intermediate_size": "dense_dim", "attention_bias": "attention_bias"},
    defaults={"head_dim": 128, "attention_bias": False},
    implied={"qk_norm": "head"},
    constants={"use_sliding_window": (False,)},
    # Without use_sliding_window no layer has a window, whatever this is.
    special_keys=frozenset({"sliding_window", "layer_types"}),
    router=None,
    expert="mlp",
)
DENSE_ARCHITECTURES = {a.name: a for a in (LLAMA, QWEN3)}
