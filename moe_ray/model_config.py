"""Settings of the model, the rules that they keep, and what follows from them: shapes, parameters, FLOPs."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from moe_ray.errors import ConfigError
from moe_ray.presets import PRESETS
from moe_ray.section import BelowOne, Count, Factor, NonNegativeFloat, NonNegativeInt, Section, Width

Preset = Literal["basic", "custom", "switch", "mixtral", "glam", "olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss"]
Activation = Literal["swiglu", "swigluoai", "geglu", "gelu", "relu", "relu2"]
GATED: frozenset[Activation] = frozenset({"swiglu", "swigluoai", "geglu"})
ROUTERS = ("top_k", "expert_choice", "hash", "forced_balance")
# Settings without meaning for a router: they belong to the top-k router, and experts that choose are never full.
_TOP_K_FIELDS = (
    *("score_func", "softmax_after_top_k", "router_bias", "noisy_top_k"),
    *("num_expert_groups", "num_limited_groups", "expert_bias"),
)
_MEANINGLESS = {
    "hash": _TOP_K_FIELDS,
    "forced_balance": _TOP_K_FIELDS,
    "expert_choice": (*_TOP_K_FIELDS, "capacity_factor", "eval_capacity_factor"),
}
# What a model is trained with but not made of: a run may set these otherwise than the folder it starts from.
TRAINING_FIELDS = frozenset(
    {
        "preset",
        "init_from",
        "upcycle_from",
        "upcycle_noise",
        "init_std",
        "capacity_factor",
        "eval_capacity_factor",
        "router_jitter",
        "expert_bias_update_rate",
        "load_balancing_loss_weight",
        "load_balancing_scope",
        "router_z_loss_weight",
        "max_sequence_length",
    }
)


class RopeScaling(Section):
    """Rotary frequencies changed for contexts longer than the model was first trained on."""

    type: Literal["linear", "llama3", "yarn"] = Field(description="how frequencies are interpolated")
    factor: PositiveFloat = Field(description="longest context over `original_length`")
    original_length: Width | None = Field(None, description="context of the first training")
    low_freq_factor: PositiveFloat = Field(1.0, description="llama3: wavelengths above are interpolated")
    high_freq_factor: PositiveFloat = Field(4.0, description="llama3: wavelengths below are kept")
    beta_fast: PositiveFloat = Field(32.0, description="yarn: turns in the original context that are kept")
    beta_slow: PositiveFloat = Field(1.0, description="yarn: turns that are interpolated")
    truncate: bool = Field(True, description="yarn: round the bounds to whole dims")
    attention_factor: PositiveFloat | None = Field(None, description="yarn: scale of cosines and sines")
    mscale: NonNegativeFloat | None = Field(None, description="yarn: attention scale (DeepSeek)")
    mscale_all_dim: NonNegativeFloat | None = Field(None, description="yarn: softmax scale (DeepSeek)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.original_length is None and self.type != "linear":
            raise ConfigError(
                f"model.rope_scaling of type {self.type} has no original_length.",
                "give the context it started from.",
            )
        return self


class ModelConfig(Section):
    """Architecture of a decoder-only transformer in which some feed-forward layers are Mixture-of-Experts."""

    preset: Preset = Field("basic", description="architecture that the other settings start from")
    init_from: str | None = Field(None, description="Hugging Face folder to take architecture and weights from")
    upcycle_from: str | None = Field(None, description="folder of a dense Llama or Qwen3 to turn into a MoE")
    upcycle_noise: NonNegativeFloat = Field(0.0, description="noise on copied experts, relative to their std")

    vocab_size: Width = Field(4096, description="rows of the embedding; a trained tokenizer has as many ids")
    dim: Width = Field(256, description="width of the residual stream (D)")
    num_layers: Count = Field(4, description="transformer blocks")
    max_sequence_length: Width = Field(512, description="longest context in tokens (S)")
    norm_eps: PositiveFloat = Field(1e-5, description="epsilon of RMSNorm")
    tie_embeddings: bool = Field(True, description="use the embedding matrix as the output head")
    init_std: PositiveFloat = Field(0.02, description="standard deviation of the initial weights")

    attention: Literal["gqa", "mla"] = Field("gqa", description="grouped-query or multi-head latent attention")
    num_heads: Count = Field(4, description="query heads (H)")
    num_kv_heads: Count = Field(2, description="key/value heads, shared by groups of query heads")
    head_dim: Width | None = Field(None, description="width of one head; null: dim / num_heads")
    qk_norm: Literal["none", "head", "full"] = Field(
        "none", description="RMSNorm of queries and keys, each head for itself or all heads together"
    )
    clip_qkv: PositiveFloat | None = Field(None, description="largest absolute query, key and value")
    attention_bias: bool = Field(False, description="biases of the attention projections")
    attention_sinks: bool = Field(False, description="a learned logit a head that takes attention from all tokens")
    sliding_window: Width | None = Field(None, description="tokens that a token attends to, itself included")
    full_attention_every: NonNegativeInt = Field(
        0, description="with a window, every n-th block attends to everything; 0: none does"
    )
    q_lora_rank: Width | None = Field(None, description="mla: width of the query latent; null: no latent")
    kv_lora_rank: Width = Field(64, description="mla: width of the key/value latent")
    qk_nope_head_dim: Width = Field(32, description="mla: part of a head without position")
    qk_rope_head_dim: Width = Field(16, description="mla: part of a head with rotary position")
    v_head_dim: Width = Field(32, description="mla: width of a value head")
    rope_theta: Annotated[float, Field(gt=1)] = Field(
        10_000.0, description="base of the rotary position frequencies"
    )
    rope_interleaved: bool = Field(True, description="mla: rotate neighbouring dims instead of the two halves")
    rope_scaling: RopeScaling | None = Field(None, description="longer contexts: {type: yarn, factor: 4, …}")

    num_dense_layers: NonNegativeInt = Field(0, description="first blocks that keep a dense feed-forward")
    moe_every: Count = Field(1, description="after the dense layers, every n-th block is MoE")
    dense_dim: Width = Field(512, description="hidden width of a dense feed-forward")
    activation: Activation = Field("swiglu", description="of experts and dense feed-forwards; *glu are gated")
    swiglu_alpha: PositiveFloat = Field(1.702, description="swigluoai: gain of the sigmoid")
    swiglu_limit: PositiveFloat = Field(7.0, description="swigluoai: clamp of gate and up projection")

    num_experts: Count = Field(8, description="experts of each MoE layer (E)")
    top_k: Annotated[int, Field(ge=1, le=8)] = Field(
        2, description="experts that each token is routed to (K); with expert_choice the mean over tokens"
    )
    expert_dim: Width = Field(256, description="hidden width of one expert (F)")
    expert_ffn_bias: bool = Field(False, description="biases inside the experts")
    num_shared_experts: NonNegativeInt = Field(0, description="experts of the same width that every token uses")
    shared_expert_gate: bool = Field(False, description="scale the shared experts by a learned sigmoid")

    router: str = Field("top_k", description=f"one of {', '.join(ROUTERS)}, or your own as module:Class")
    score_func: Literal["softmax", "sigmoid"] = Field("softmax", description="router logits to scores")
    softmax_after_top_k: bool = Field(False, description="softmax over the chosen experts only")
    route_norm: bool = Field(True, description="rescale the top-k routing weights to sum to 1")
    route_scale: PositiveFloat = Field(1.0, description="factor of the routing weights")
    router_bias: bool = Field(False, description="bias of the router logits")
    router_jitter: BelowOne = Field(0.0, description="training: router input times 1 ± this at random")
    noisy_top_k: bool = Field(False, description="training: learned noise on the router logits")
    num_expert_groups: Count = Field(1, description="groups of experts for limited routing")
    num_limited_groups: Count = Field(1, description="groups that a token may choose experts from")
    expert_bias: bool = Field(False, description="balance by a bias of each expert's score instead of a loss")
    expert_bias_update_rate: NonNegativeFloat = Field(0.001, description="change of the bias in a step")
    capacity_factor: Factor | None = Field(
        None, description="training: tokens an expert takes from a sequence over the mean; null: dropless"
    )
    eval_capacity_factor: Factor | None = Field(None, description="the same in evaluation; generation never drops")
    load_balancing_loss_weight: NonNegativeFloat = Field(0.01, description="weight of the load-balancing loss")
    load_balancing_scope: Literal["micro_batch", "sequence", "global_batch"] = Field(
        "global_batch", description="over what the load in the load-balancing loss is counted"
    )
    router_z_loss_weight: NonNegativeFloat = Field(0.001, description="weight of the router z-loss")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # An unknown preset is refused by the field's type.
        preset = given.get("preset")
        base = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        meaningless = _MEANINGLESS.get(str(given.get("router")), ())
        given = {name: value for name, value in base.items() if name not in meaningless} | given
        if given.get("attention") == "mla":
            # Each head has keys of its own.
            given = {"num_kv_heads": given.get("num_heads", cls.model_fields["num_heads"].default)} | given
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_attention(self)
        _check_experts(self)
        _check_router(self)
        return self

    @property
    def qk_dim(self) -> int:
        """Width of one query or key head."""
        if self.attention == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.dim // self.num_heads

    @property
    def v_dim(self) -> int:
        """Width of one value head."""
        return self.v_head_dim if self.attention == "mla" else self.qk_dim

    @property
    def rope_dim(self) -> int:
        """Dims of a query or key head that rotate with the position."""
        return self.qk_rope_head_dim if self.attention == "mla" else self.qk_dim

    @property
    def is_gated(self) -> bool:
        """Whether feed-forwards have a gate projection beside the up projection."""
        return self.activation in GATED

    @property
    def moe_layers(self) -> range:
        """Indices of the blocks whose feed-forward is Mixture-of-Experts."""
        return range(self.num_dense_layers + self.moe_every - 1, self.num_layers, self.moe_every)

    def is_known(self, field: str) -> bool:
        """Whether a field has its final value: not while a folder that has not been read may decide it."""
        return (self.init_from is None and self.upcycle_from is None) or field in self.model_fields_set

    def window(self, layer: int) -> int | None:
        """Tokens that block `layer` attends to; None: all."""
        every = self.full_attention_every
        return None if every and (layer + 1) % every == 0 else self.sliding_window

    def num_params(self) -> int:
        """Parameters of the whole model; tied embeddings count once. Buffers, such as expert biases, do not."""
        return self._params(self.num_experts)

    def num_expert_params(self) -> int:
        """Parameters of all routed experts; `num_params` counts them too."""
        return self.num_params() - self._params(0)

    def num_active_params(self) -> int:
        """Parameters that one token uses: all of `num_params` but the experts that it is not routed to."""
        return self._params(self.top_k)

    def flops_per_token(self, sequence_length: int) -> int:
        """Matmul FLOPs of one training step per token, forward and backward (PaLM, appendix B, active parameters).

        Forward is 2 FLOPs a matmul parameter plus 2 * S * (query/key + value width) a block for attention
        (not halved for causality, nor for windows shorter than S); backward is twice the forward.
        """
        num_moe = len(self.moe_layers)
        lookup = 0 if self.tie_embeddings else self.vocab_size * self.dim
        attention = self.num_layers * (self._attention_params() - self._attention_vectors())
        feed_forward = num_moe * self._moe_matmul_params() + (self.num_layers - num_moe) * self._ffn(
            self.dense_dim
        )
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        matmul_params = embeddings - lookup + attention + feed_forward
        scores = 2 * self.num_layers * sequence_length * self.num_heads * (self.qk_dim + self.v_dim)
        return 3 * (2 * matmul_params + scores)

    def _params(self, experts_per_layer: int) -> int:
        num_moe = len(self.moe_layers)
        bias = (2 if self.is_gated else 1) * self.expert_dim + self.dim if self.expert_ffn_bias else 0
        expert = self._ffn(self.expert_dim) + bias
        router = self._router_matmul_params() + (self.num_experts if self.router_bias else 0)
        shared = self._ffn(self.expert_dim * self.num_shared_experts) + (
            self.dim if self.shared_expert_gate else 0
        )
        moe = router + shared + experts_per_layer * expert
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        norms = (2 * self.num_layers + 1) * self.dim
        dense = (self.num_layers - num_moe) * self._ffn(self.dense_dim)
        return embeddings + norms + self.num_layers * self._attention_params() + num_moe * moe + dense

    def _moe_matmul_params(self) -> int:
        shared = self._ffn(self.expert_dim * self.num_shared_experts) + (
            self.dim if self.shared_expert_gate else 0
        )
        return self._router_matmul_params() + shared + self.top_k * self._ffn(self.expert_dim)

    def _router_matmul_params(self) -> int:
        if self.router in ("hash", "forced_balance"):
            return self.dim * self.num_experts if self.router == "forced_balance" else 0
        return self.dim * self.num_experts * (2 if self.noisy_top_k else 1)

    def _ffn(self, hidden: int) -> int:
        return (3 if self.is_gated else 2) * self.dim * hidden

    def _attention_vectors(self) -> int:
        """Norms, biases and sinks of one attention."""
        sinks = self.num_heads if self.attention_sinks else 0
        if self.attention == "mla":
            rank = self.q_lora_rank or 0
            biases = rank + self.kv_lora_rank + self.qk_rope_head_dim + self.dim if self.attention_bias else 0
            return rank + self.kv_lora_rank + biases + sinks
        heads = self.num_heads + self.num_kv_heads
        norms = {"none": 0, "head": 2 * self.qk_dim, "full": heads * self.qk_dim}[self.qk_norm]
        biases = (heads + self.num_kv_heads) * self.qk_dim + self.dim if self.attention_bias else 0
        return norms + biases + sinks

    def _attention_params(self) -> int:
        out = self.num_heads * self.v_dim * self.dim
        if self.attention == "mla":
            q_dim = self.num_heads * self.qk_dim
            queries = self.q_lora_rank * (self.dim + q_dim) if self.q_lora_rank else self.dim * q_dim
            latent = self.dim * (self.kv_lora_rank + self.qk_rope_head_dim)
            up = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
            matrices = queries + latent + up + out
        else:
            matrices = self.dim * self.qk_dim * (self.num_heads + 2 * self.num_kv_heads) + out
        return matrices + self._attention_vectors()


def _check_attention(model: ModelConfig) -> None:
    if model.attention == "gqa" and model.head_dim is None and model.dim % model.num_heads:
        raise ConfigError(
            f"model.dim={model.dim} is not a multiple of model.num_heads={model.num_heads}.",
            "choose a multiple, or set model.head_dim.",
        )
    if model.rope_dim % 2:
        field = "qk_rope_head_dim" if model.attention == "mla" else "head_dim"
        raise ConfigError(
            f"model.{field}={model.rope_dim} is odd, and rotary positions turn pairs.",
            f"use {model.rope_dim + 1}, or a model.dim that is a multiple of 2 * model.num_heads.",
        )
    if model.num_heads % model.num_kv_heads:
        raise ConfigError(
            f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}.",
            f"use one of {divisors(model.num_heads)}.",
        )
    if model.attention == "mla":
        allowed = {"head_dim": None, "qk_norm": "none", "clip_qkv": None, "num_kv_heads": model.num_heads}
        for field, only in allowed.items():
            if getattr(model, field) != only:
                raise ConfigError(
                    f"model.{field}={getattr(model, field)!r} has no meaning in model.attention=mla.",
                    f"set it to {_yaml(only)}.",
                )
    if model.full_attention_every and model.sliding_window is None:
        raise ConfigError(
            f"model.full_attention_every={model.full_attention_every} without model.sliding_window does nothing.",
            "set model.sliding_window, or model.full_attention_every to 0.",
        )
    if model.full_attention_every == 1:
        raise ConfigError(
            f"model.sliding_window={model.sliding_window} with model.full_attention_every=1 does nothing.",
            "set model.full_attention_every to 2 or more, or model.sliding_window to null.",
        )


def _check_experts(model: ModelConfig) -> None:
    if model.init_from is not None and model.upcycle_from is not None:
        raise ConfigError("model.init_from and model.upcycle_from are both set.", "keep one of them.")
    if model.top_k > model.num_experts:
        raise ConfigError(
            f"model.top_k={model.top_k} is more than model.num_experts={model.num_experts}.",
            f"set model.top_k to at most {model.num_experts} or raise model.num_experts.",
        )
    for field in ("dim", "expert_dim"):
        if getattr(model, field) % 8:
            raise ConfigError(
                f"model.{field}={getattr(model, field)} is not a multiple of 8, which grouped_mm needs.",
                f"use {-(-getattr(model, field) // 8) * 8}.",
            )
    if not model.moe_layers and model.is_known("num_layers"):
        raise ConfigError(
            f"model.num_dense_layers={model.num_dense_layers} with model.moe_every={model.moe_every} "
            f"leaves no MoE layer among model.num_layers={model.num_layers}.",
            "lower model.num_dense_layers or model.moe_every.",
        )
    if model.shared_expert_gate and not model.num_shared_experts:
        raise ConfigError(
            "model.shared_expert_gate=True without shared experts does nothing.", "set model.num_shared_experts."
        )


def _check_router(model: ModelConfig) -> None:
    if model.router not in ROUTERS and model.router.count(":") != 1:
        raise ConfigError(
            f"model.router={model.router!r} is unknown.",
            f"use one of {', '.join(ROUTERS)}, or your own as module:Class.",
        )
    for field in _MEANINGLESS.get(model.router, ()):
        value, default = getattr(model, field), ModelConfig.model_fields[field].default
        if value != default:
            raise ConfigError(
                f"model.{field}={value!r} has no meaning with model.router={model.router}.",
                f"set it to {_yaml(default)}, or use model.router=top_k.",
            )
    if model.softmax_after_top_k and model.score_func != "softmax":
        raise ConfigError(
            "model.softmax_after_top_k=True with model.score_func=sigmoid has no softmax.", "set one of them."
        )
    if model.num_experts % model.num_expert_groups or model.num_limited_groups > model.num_expert_groups:
        raise ConfigError(
            f"model.num_expert_groups={model.num_expert_groups} with "
            f"model.num_limited_groups={model.num_limited_groups} does not fit "
            f"model.num_experts={model.num_experts}.",
            f"use a number of groups out of {divisors(model.num_experts)} and at most as many limited groups.",
        )
    reachable = model.num_limited_groups * model.num_experts // model.num_expert_groups
    if model.num_expert_groups > 1 and model.top_k > reachable:
        raise ConfigError(
            f"model.top_k={model.top_k} is more than the {reachable} experts of "
            f"model.num_limited_groups={model.num_limited_groups} groups.",
            "raise model.num_limited_groups or lower model.top_k.",
        )


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower()


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]
