"""Generation on a CPU: a whole forward pass is one call of the C++ in `moe_ray/native`.

Shapes: T tokens of the pass, S spans, D model dim, B rows that get a token, V vocabulary, C head dim,
P positions, R rows of the tables, M blocks that a sequence may have.
"""

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from moe_ray.models.attention import Attention
from moe_ray.models.experts import GroupedExperts
from moe_ray.models.feed_forward import FeedForward
from moe_ray.models.moe import MoE
from moe_ray.models.quantize import QuantizedExperts
from moe_ray.models.rope import Rope, rope_cos_sin, softmax_scale
from moe_ray.models.router import Router
from moe_ray.models.top_k_router import TopKRouter
from moe_ray.models.transformer import Block, Transformer
from moe_ray.native.build import load
from moe_ray.native.matrix import TYPES, Matrix, as_matrices, as_matrix, multiply
from moe_ray.offload.experts import OffloadedExperts, offloaded_experts
from moe_ray.serving.engine.cache import KVCache
from moe_ray.serving.engine.layout import Layout
from moe_ray.serving.engine.offloaded_layers import ACQUIRE, OffloadedLayers

# Of the first table of rotations.
_FIRST_POSITIONS = 512
_ACTIVATIONS = ("swiglu", "swigluoai", "geglu", "gelu", "relu", "relu2")


def _struct(name: str, *groups: tuple[Any, str]) -> type[Structure]:
    """Fields as model.hpp declares them: of each group a type and names."""
    fields = [(field, kind) for kind, names in groups for field in names.split()]
    return type(name, (Structure,), {"_fields_": tuple(fields)})


_Layer = _struct(
    "_Layer",
    (c_void_p, "attention_norm ffn_norm"),
    (Matrix, "wq wk wv wo"),
    (c_void_p, "bq bk bv bo q_norm k_norm sinks keys values"),
    (c_int64, "window"),
    (Matrix, "router"),
    (c_void_p, "router_bias expert_bias"),
    (c_void_p, "w_in w_out b_in b_out"),
    (Matrix, "dense_in dense_out"),
    (c_void_p, "shared_gate"),
)
_Model = _struct(
    "_Model",
    (c_void_p, "layers"),
    (Matrix, "embed"),
    (c_void_p, "norm"),
    (c_int64, "num_layers dim heads kv_heads head_dim block_tokens"),
    (c_int64, "num_experts top_k expert_dim num_groups num_limited_groups"),
    (c_float, "norm_eps softmax_scale clip_qkv swiglu_alpha swiglu_limit route_scale"),
    (c_int32, "cache_type norm_heads norm_all_heads activation sigmoid softmax_after_top_k route_norm"),
    (ACQUIRE, "acquire"),
)
_Pass = _struct(
    "_Pass",
    (c_void_p, "tokens spans tables cosines sines"),
    (c_int64, "num_tokens num_spans table_width"),
)


def unsupported(model: Transformer) -> str | None:
    """What of a model the C++ cannot do; None: nothing."""
    config, weight = model.config, model.embed.weight
    if weight.device.type != "cpu":
        return f"the device {weight.device.type}"
    if config.attention != "gqa":
        return f"model.attention={config.attention}"
    if config.router != "top_k":
        return f"model.router={config.router}"
    dtypes = {p.dtype for m in model.modules() if not isinstance(m, Router) for p in m.parameters(recurse=False)}
    if not dtypes <= {weight.dtype}:
        return "weights of several types"
    return None


class NativeRunner:
    """A `Runner`.

    Weights are used where they lie. Activations are float32 whatever the type of the weights.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._library = load()
        self._config = model.config
        # Memory that the structures point to.
        self._kept: list[Any] = [cache]
        self._rope_table: Rope = (torch.empty(0), torch.empty(0))
        self._offloaded = OffloadedLayers(model.config.top_k)
        layers = [
            self._layer(block, index, cache)
            for index, block in enumerate(model.layers)
            if isinstance(block, Block)
        ]
        self._layers = (_Layer * len(layers))(*layers)
        self._model = self._describe(model, cache)
        self._head = self._matrix(model.embed.weight if model.head is None else model.head.weight)

    def forward(self, tokens_T: np.ndarray, layout: Layout) -> Tensor:
        """See `Runner`; the result is float32."""
        spans_S3, tables_RM = layout.spans_S3, layout.tables_RM
        assert all(array.flags.c_contiguous for array in (tokens_T, spans_S3, tables_RM))
        assert tokens_T.dtype == spans_S3.dtype == np.int64
        assert tables_RM.dtype == np.int32
        cos_PC, sin_PC = self._rope(int((spans_S3[:, 1] + spans_S3[:, 2]).max()))
        pass_ = _Pass(
            *(array.ctypes.data for array in (tokens_T, spans_S3, tables_RM)),
            cos_PC.data_ptr(),
            sin_PC.data_ptr(),
            len(tokens_T),
            len(spans_S3),
            tables_RM.shape[1],
        )
        hidden_TD = torch.empty(len(tokens_T), self._config.dim)
        missing = self._library.forward(
            ctypes.byref(self._model), ctypes.byref(pass_), c_void_p(hidden_TD.data_ptr()), torch.get_num_threads()
        )
        if missing:
            assert self._offloaded.failure is not None
            raise self._offloaded.failure
        return hidden_TD

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """See `Runner`."""
        return multiply(self._head, hidden_BD.float().contiguous())

    def _rope(self, length: int) -> Rope:
        """Rotations of at least so many positions."""
        if length > len(self._rope_table[0]):
            position_1P = torch.arange(max(_FIRST_POSITIONS, 1 << (length - 1).bit_length()))[None]
            cos_11PC, sin_11PC = rope_cos_sin(position_1P, self._config)
            self._rope_table = cos_11PC[0, 0].contiguous(), sin_11PC[0, 0].contiguous()
        return self._rope_table

    def _describe(self, model: Transformer, cache: KVCache) -> Structure:
        config = self._config
        # Attention reads whole vectors of positions within a block.
        assert cache.block_tokens % 16 == 0
        return _Model(
            layers=ctypes.cast(self._layers, c_void_p),
            embed=self._matrix(model.embed.weight),
            norm=self._vector(model.norm.weight),
            num_layers=config.num_layers,
            dim=config.dim,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.qk_dim,
            block_tokens=cache.block_tokens,
            num_experts=config.num_experts,
            top_k=config.top_k,
            expert_dim=config.expert_dim,
            num_groups=config.num_expert_groups,
            num_limited_groups=config.num_limited_groups,
            norm_eps=config.norm_eps,
            softmax_scale=softmax_scale(config),
            clip_qkv=config.clip_qkv or 0,
            swiglu_alpha=config.swiglu_alpha,
            swiglu_limit=config.swiglu_limit,
            route_scale=config.route_scale,
            cache_type=TYPES[cache.layers[0][0].dtype],
            norm_heads=config.qk_norm == "head",
            norm_all_heads=config.qk_norm == "full",
            activation=_ACTIVATIONS.index(config.activation),
            sigmoid=config.score_func == "sigmoid",
            softmax_after_top_k=config.softmax_after_top_k,
            route_norm=config.route_norm,
            acquire=ACQUIRE(self._offloaded.acquire if any(offloaded_experts(model)) else 0),
        )

    def _layer(self, block: Block, index: int, cache: KVCache) -> Structure:
        attention, ffn = block.attention, block.ffn
        assert isinstance(attention, Attention)
        keys, values = cache.layers[index]
        layer = _Layer(
            attention_norm=self._vector(block.attention_norm.weight),
            ffn_norm=self._vector(block.ffn_norm.weight),
            q_norm=self._vector(getattr(attention.q_norm, "weight", None)),
            k_norm=self._vector(getattr(attention.k_norm, "weight", None)),
            sinks=self._vector(attention.sinks_H),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            window=attention.window or 0,
        )
        for name in "qkvo":
            linear = getattr(attention, f"w{name}")
            setattr(layer, f"w{name}", self._matrix(linear.weight))
            setattr(layer, f"b{name}", self._vector(linear.bias))
        if isinstance(ffn, MoE):
            self._add_experts(layer, ffn, index)
        feed_forward = ffn.shared if isinstance(ffn, MoE) else ffn
        if isinstance(feed_forward, FeedForward):
            layer.dense_in = self._matrix(feed_forward.w_in.weight)
            layer.dense_out = self._matrix(feed_forward.w_out.weight)
        return layer

    def _add_experts(self, layer: Any, moe: MoE, index: int) -> None:
        router, experts = moe.router, cast(nn.Module, moe.experts)
        assert isinstance(router, TopKRouter)
        layer.router = self._matrix(router.weight.float())
        layer.router_bias, layer.expert_bias = self._vector(router.bias), self._vector(router.expert_bias_E)
        if isinstance(experts, OffloadedExperts):
            matrices, biases = self._offloaded.add(index, experts), (experts.b_in_EG, experts.b_out_ED)
        elif isinstance(experts, QuantizedExperts):
            matrices = (
                as_matrices(experts.w_in_codes_e, experts.w_in_scales_e),
                as_matrices(experts.w_out_codes_e, experts.w_out_scales_e),
            )
            biases = experts.b_in_eG, experts.b_out_eD
        else:
            assert isinstance(experts, GroupedExperts)
            matrices = as_matrices(experts.w_in_eGD), as_matrices(experts.w_out_eDF)
            biases = experts.b_in_eG, experts.b_out_eD
        self._kept += [experts, *matrices]
        layer.w_in, layer.w_out = (ctypes.addressof(array) for array in matrices)
        layer.b_in, layer.b_out = map(self._vector, biases)
        layer.shared_gate = self._vector(getattr(moe.shared_gate, "weight", None))

    def _matrix(self, weight: Tensor) -> Matrix:
        self._kept.append(weight)
        return as_matrix(weight)

    def _vector(self, weight: Tensor | None) -> int | None:
        """A copy in float32; None stays absent."""
        if weight is None:
            return None
        self._kept.append(weight.detach().float().contiguous())
        return self._kept[-1].data_ptr()
