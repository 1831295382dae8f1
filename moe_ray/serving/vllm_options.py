"""What vLLM is told: our settings and the parameters of requests in its terms."""

import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from moe_ray.config import ModelConfig
from moe_ray.errors import RequestError
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.engine.cache import FREE_SHARE, blocks_of, bytes_per_block, count_blocks
from moe_ray.serving.engine.request import MAX_LOGPROBS, SamplingParams, Tokenizer
from moe_ray.serving.engine.sampler import Logprob

_LEAST_TEMPERATURE = 0.01
# Tokens of a block of its CPU cache, to which each text is rounded up.
_CPU_BLOCK_TOKENS = 128
# As our own grammars: a small model left free to choose white space may write nothing else.
_JSON_FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def engine_arguments(folder: Path, model: ModelConfig, config: ServeConfig, max_context: int) -> dict[str, Any]:
    """Those of AsyncEngineArgs; sets the environment that vLLM's process begins with."""
    # It has a thread here already; it reports nothing to anybody, and all that it reads is on this node.
    settings = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = {
        "model": str(folder),
        "dtype": config.dtype,
        "load_format": "safetensors",
        "generation_config": "vllm",
        "max_model_len": max_context,
        "max_num_seqs": config.max_batch_size,
        "max_logprobs": MAX_LOGPROBS,
        "logprobs_mode": "raw_logprobs",
        "scheduling_policy": "priority",
        "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        "kv_cache_memory_bytes": config.kv_cache_bytes,
        "disable_log_stats": True,
    }
    if config.gpus_per_replica:
        arguments["gpu_memory_utilization"] = 0.9 * min(config.gpus_per_replica, 1.0)
    else:
        # Cores are shared with other replicas, and compiling takes longer than it gains.
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(torch.get_num_threads())}
        arguments["enforce_eager"] = True
        arguments["kv_cache_memory_bytes"] = config.kv_cache_bytes or _cpu_cache_bytes(model, config, max_context)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    return arguments


def _cpu_cache_bytes(model: ModelConfig, config: ServeConfig, max_context: int) -> int:
    """As our own cache would take: vLLM's default is a share of all memory of the node."""
    dtype = getattr(torch, config.dtype)
    longest = -(-max_context // _CPU_BLOCK_TOKENS) * _CPU_BLOCK_TOKENS
    wanted = (config.max_batch_size + 1) * blocks_of(longest)
    share = FREE_SHARE / config.max_replicas
    blocks = count_blocks(model, dtype, torch.device("cpu"), wanted=wanted, budget_bytes=None, free_share=share)
    return blocks * bytes_per_block(model, dtype)


def check_supported(params: SamplingParams) -> None:
    """Raise a RequestError for what vLLM would silently do otherwise than the API says."""
    if 0 < params.temperature < _LEAST_TEMPERATURE:
        raise RequestError(
            f"temperature={params.temperature} is not possible with vLLM.",
            f"use 0, or at least {_LEAST_TEMPERATURE}.",
            param="temperature",
        )
    if params.repetition_penalty != 1 and params.logit_bias:
        # It adds the bias first.
        raise RequestError(
            "repetition_penalty and logit_bias are not possible together with vLLM.",
            "use one of them.",
            param="logit_bias",
        )


def sampling_params(params: SamplingParams, tokenizer: Tokenizer, allowed_ids: list[int] | None) -> Any:
    """vLLM's of a request.

    Args:
        allowed_ids: the only tokens that may be chosen; None: all rows of the model are tokens.
    """
    from vllm import SamplingParams as VllmSamplingParams  # ty: ignore[import-not-found]
    from vllm.sampling_params import (  # ty: ignore[import-not-found]
        RequestOutputKind,
        StructuredOutputsParams,
    )

    form = None
    if params.grammar is not None:
        schema = json.loads(params.grammar.source) | {"x-guidance": _JSON_FORM}
        form = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    return VllmSamplingParams(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=min(params.top_k, tokenizer.vocab_size),
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        logit_bias=dict(params.logit_bias) or None,
        structured_outputs=form,
        # What ends a text is for `Generation` to say; vLLM only has to stop there too.
        ignore_eos=True,
        stop_token_ids=[] if params.ignore_eos else sorted(tokenizer.stop_ids),
        # -1 means none to it.
        seed=None if params.seed is None else params.seed % 2**63,
        logprobs=params.logprobs,
        allowed_token_ids=allowed_ids,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def to_logprob(found: dict[int, Any], token_id: int, count: int, vocab_size: int) -> Logprob:
    """That of a chosen token, of what vLLM found in its place: itself and the most likely ones, with ranks.

    Args:
        vocab_size: rows of the model from here on are no tokens, and left out.
    """
    ranked = sorted((lp.rank, other, lp.logprob) for other, lp in found.items() if lp.rank <= count)
    # What a grammar forbids has -inf.
    top = tuple((other, lp) for _, other, lp in ranked[:count] if other < vocab_size and lp > -math.inf)
    return Logprob(found[token_id].logprob, top)
