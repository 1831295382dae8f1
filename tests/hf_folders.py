"""Tiny models with random weights, made and saved by `transformers`: the reference that ours must equal."""

import functools
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_ray.data.tokenizer import Tokenizer, train_tokenizer

LINES = ["the cat sat on the mat and saw the other cat", "naïve café, 東京 🙂 and more text of all kinds"]
_DENSE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_SIZES = _DENSE | {"num_experts_per_tok": 2}
_DEEPSEEK = _SIZES | {
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 10_000.0,
}
_EXPERTS = {"intermediate_size": 16, "num_local_experts": 4}
_QWEN3 = _SIZES | {"intermediate_size": 40, "moe_intermediate_size": 16, "num_experts": 4, "head_dim": 16}

# Class of the config, and its settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", _SIZES | _EXPERTS | {"head_dim": 16}),
    "mixtral, tied, window, yarn": (
        "MixtralConfig",
        _SIZES
        | _EXPERTS
        | {"head_dim": 8, "tie_word_embeddings": True, "sliding_window": 5, "rope_parameters": _YARN},
    ),
    "olmoe, biases, clipped": (
        "OlmoeConfig",
        _SIZES | {"intermediate_size": 16, "num_experts": 8, "attention_bias": True, "clip_qkv": 0.5},
    ),
    "olmoe, normalised, llama3": (
        "OlmoeConfig",
        _SIZES | {"intermediate_size": 16, "num_experts": 8, "norm_topk_prob": True, "rope_parameters": _LLAMA3},
    ),
    "qwen3_moe, first layer dense": ("Qwen3MoeConfig", _QWEN3 | {"mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3_moe, every other, window, biases": (
        "Qwen3MoeConfig",
        _QWEN3
        | {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 6, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5_000.0}},
    ),
    "deepseek_v3, yarn": (
        "DeepseekV3Config",
        _DEEPSEEK | {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    "deepseek_v3, full queries, halves, biases": (
        "DeepseekV3Config",
        _DEEPSEEK
        | {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True, "norm_topk_prob": False}
        | {"n_shared_experts": 2, "rms_norm_eps": 1e-3},
    ),
    "gpt_oss": ("GptOssConfig", _SIZES | _EXPERTS | {"head_dim": 16, "sliding_window": 6}),
    "gpt_oss, no windows": (
        "GptOssConfig",
        _SIZES | _EXPERTS | {"head_dim": 16, "layer_types": ["full_attention"] * _SIZES["num_hidden_layers"]},
    ),
    "gpt_oss, every third full, no scaling": (
        "GptOssConfig",
        _SIZES
        | _EXPERTS
        | {"head_dim": 8, "sliding_window": 4, "swiglu_limit": 1.0, "num_hidden_layers": 3}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
}
DENSE_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _DENSE | {"intermediate_size": 48, "rope_parameters": _LLAMA3}),
    "llama, tied": ("LlamaConfig", _DENSE | {"intermediate_size": 48, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _DENSE | {"intermediate_size": 48, "head_dim": 16}),
}


@functools.cache
def tokenizer() -> Tokenizer:
    """A tokenizer of a little more than the 256 bytes."""
    return train_tokenizer(LINES * 5, 320)


def make_folder(
    path: Path, class_name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32, **save: Any
) -> Path:
    """Save a random model and our tokenizer; weights are large enough that no part of the model is negligible."""
    config = getattr(transformers, class_name)(vocab_size=tokenizer().vocab_size, **settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            is_scale = name.endswith("norm.weight") or "layernorm" in name
            tensor.normal_(1.0 if is_scale else 0.0, 0.2)
    model.to(dtype).save_pretrained(path, **save)
    tokenizer().save(path / "tokenizer.json")
    return path


def load_reference(path: Path, **options: Any) -> PreTrainedModel:
    """What `transformers` makes of a folder."""
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", **options).eval()
