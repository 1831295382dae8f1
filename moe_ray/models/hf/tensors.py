"""Which tensor of a Hugging Face file is which part of our model, in both directions.

Shapes: V vocabulary, D model dim, F hidden dim of a feed-forward, G = 2 * F, E experts, e local experts, N rows
and q groups of columns of a quantized matrix, B bytes of a group.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ray.models.hf.architectures import Architecture
from moe_ray.models.quantize import GROUP, quantize_experts, scheme_of
from moe_ray.models.transformer import Transformer

_MODEL_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_LAYER_MODULES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
}
_LATENT_MODULES = _LAYER_MODULES | {
    "attention.wq_down": "self_attn.q_a_proj",
    "attention.q_norm": "self_attn.q_a_layernorm",
    "attention.wq_up": "self_attn.q_b_proj",
    "attention.wkv_down": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_up": "self_attn.kv_b_proj",
}
_FEED_FORWARDS = {"ffn": "mlp", "ffn.shared": "mlp.shared_experts"}
_DENSE_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ROUTER_NAMES = {"expert_bias_E": "e_score_correction_bias"}
# Statistics of training, which no file holds.
_UNMAPPED = "ffn.router.load_fraction_E"


@dataclass(frozen=True)
class Piece:
    """A tensor of a file, and the part of one of our tensors that it is.

    Attributes:
        name: its name in the file.
        shape: its shape in the file.
        view: strided view of our memory with the same elements in the same order, dims split or not.
        ours: name of our tensor.
        rows: the part of the file's tensor, on its first dim, that `view` is; None: all of it.
        expert: global index of the expert that it belongs to; None: none or all local ones.
    """

    name: str
    shape: tuple[int, ...]
    view: Tensor
    ours: str
    rows: slice | None = None
    expert: int | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether it is codes or scales, which have one type only."""
        return "_codes_" in self.ours or "_scales_" in self.ours

    def load(self, stored: Tensor) -> None:
        """Copy what a file has at `name`, cut to `rows`, into our memory, in our dtype."""
        self.view.copy_(stored.reshape(self.view.shape))

    def as_stored(self, dtype: torch.dtype) -> Tensor:
        """What a file has at `name`: contiguous, of the file's shape."""
        return self.view.to(dtype).reshape(self.shape).contiguous()


def pieces(model: Transformer, architecture: Architecture) -> Iterator[Piece]:
    """Every tensor of a Hugging Face file that this rank's share of `model` is made of.

    Codes of quantized experts stand in the place of their weights, by groups of columns, and scales beside them.
    In a dense architecture the experts of a layer are all the same piece, its feed-forward, and routers are none.
    """
    experts = next(model.moe_modules()).experts
    first, num_experts = experts.first_expert, model.config.num_experts
    for ours, tensor in model.state_dict().items():
        if ours in _MODEL_NAMES:
            yield Piece(_MODEL_NAMES[ours], tuple(tensor.shape), tensor, ours)
            continue
        _, layer, name = ours.split(".", 2)
        prefix = f"model.layers.{layer}."
        if not name.startswith("ffn.experts."):
            for theirs, view in _dense(name, tensor, architecture):
                yield Piece(prefix + theirs, tuple(view.shape), view, ours)
            continue
        if "_codes_" in name:
            tensor = _by_group(tensor)
        if architecture.expert is None:
            theirs, view, shape = _fused(name, tensor)
            yield Piece(prefix + theirs, (num_experts, *shape), view, ours, slice(first, first + len(view)))
        else:
            for local, view_of_one in enumerate(tensor):
                for theirs, view in _one_expert(name, view_of_one, architecture, first + local):
                    yield Piece(prefix + theirs, tuple(view.shape), view, ours, expert=first + local)


def stored_shapes(model: Transformer, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors in the files of a model, whatever share of it this rank holds."""
    scheme = scheme_of(model)
    with torch.device("meta"):
        whole = Transformer(model.config)
    if scheme != "none":
        quantize_experts(whole, scheme)
    return {piece.name: piece.shape for piece in pieces(whole, architecture)}


def _dense(name: str, tensor: Tensor, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Names and views of what is not an expert of a Mixture-of-Experts layer."""
    module, _, kind = name.rpartition(".")
    parent, _, projection = module.rpartition(".")
    modules = _LATENT_MODULES if architecture.implied.get("attention") == "mla" else _LAYER_MODULES
    if name == "attention.sinks_H":
        yield "self_attn.sinks", tensor
    elif name.startswith("ffn.router."):
        if architecture.router is not None and name != _UNMAPPED:
            yield f"{architecture.router}.{_ROUTER_NAMES.get(kind, kind)}", tensor
    elif parent in _FEED_FORWARDS:
        yield from _gated(_FEED_FORWARDS[parent], _DENSE_PROJECTIONS, projection, tensor)
    else:
        yield f"{modules[module]}.{kind}", tensor


def _one_expert(
    name: str, tensor: Tensor, architecture: Architecture, expert: int
) -> Iterator[tuple[str, Tensor]]:
    assert architecture.expert is not None
    projection = "w_in" if name.startswith("ffn.experts.w_in_") else "w_out"
    kind = "weight_scale" if "_scales_" in name else "weight"
    return _gated(architecture.expert.format(expert), architecture.projections, projection, tensor, kind)


def _by_group(codes: Tensor) -> Tensor:
    """[..., N, q, B], where a row of int8 is one group: with a dim more, nobody can take them for the weight."""
    return codes.unsqueeze(-2) if codes.dtype == torch.int8 else codes.unflatten(-1, (-1, GROUP // 2))


def _gated(
    module: str, projections: tuple[str, str, str], ours: str, weight: Tensor, kind: str = "weight"
) -> Iterator[tuple[str, Tensor]]:
    gate, up, down = projections
    if ours == "w_in":
        gate_FD, up_FD = weight.chunk(2)
        yield f"{module}.{gate}.{kind}", gate_FD
        yield f"{module}.{up}.{kind}", up_FD
    else:
        yield f"{module}.{down}.{kind}", weight


def _fused(name: str, tensor: Tensor) -> tuple[str, Tensor, tuple[int, ...]]:
    """gpt-oss: input dim before output dim, and gate and up columns in turn. Name, view and shape of an expert.

    Of quantized matrices the rows stay what shares a scale, and gate and up rows come in turn.
    """
    rows = tuple(tensor.shape[1:])
    match name.removeprefix("ffn.experts."):
        case "w_in_eGD":
            return "mlp.experts.gate_up_proj", tensor.unflatten(1, (2, -1)).permute(0, 3, 2, 1), rows[::-1]
        case "b_in_eG" | "w_in_codes_e" | "w_in_scales_e" as part:
            end = {"b_in_eG": "_bias", "w_in_scales_e": "_scale"}.get(part, "")
            return f"mlp.experts.gate_up_proj{end}", tensor.unflatten(1, (2, -1)).transpose(1, 2), rows
        case "w_out_codes_e":
            return "mlp.experts.down_proj", tensor, rows
        case "w_out_scales_e":
            return "mlp.experts.down_proj_scale", tensor, rows
        case "w_out_eDF":
            return "mlp.experts.down_proj", tensor.transpose(1, 2), rows[::-1]
        case _:
            return "mlp.experts.down_proj_bias", tensor, rows
