"""`POST /v1/embeddings` and `POST /v1/routing`: what the model makes of a text."""

import base64
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import Field

from moe_ray.serving.engine.request import Tokenizer
from moe_ray.serving.openai.base import Answer, Fields, PromptUsage, unsupported
from moe_ray.serving.openai.completions import PromptField
from moe_ray.serving.openai.sampling import token_name

# As many as OpenAI takes.
MAX_INPUTS = 2048


class EmbeddingRequest(Fields):
    """Body of `POST /v1/embeddings`; a field that is null counts as left out."""

    model: str = Field(description="the served model's name, as /v1/models lists it")
    input: PromptField = Field(description="a text, a list of texts, a list of token ids or a list of such lists")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="numbers, or base64 of little-endian float32"
    )
    dimensions: Any = unsupported(description="not supported: an embedding has the model's width")
    user: str | None = Field(None, description="ignored")


class Embedding(Answer):
    """The embedding of one text: of length 1, as wide as the model."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(Answer):
    """Answer of `POST /v1/embeddings`, in the order of the input."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: PromptUsage


class RoutingRequest(Fields):
    """Body of `POST /v1/routing`; a field that is null counts as left out."""

    model: str = Field(description="the served model's name, as /v1/models lists it")
    input: PromptField = Field(description="a text, a list of texts, a list of token ids or a list of such lists")


class LayerRouting(Answer):
    """Where one MoE layer sent each token of a text: lists of at most top_k, best first."""

    layer: int = Field(description="which layer of the model, from 0")
    experts: list[list[int]] = Field(description="by token, the chosen experts")
    weights: list[list[float]] = Field(description="by token, the weights of their outputs")


class TextRouting(Answer):
    """The routing of one text."""

    object: Literal["routing"]
    index: int
    token_ids: list[int]
    tokens: list[str]
    layers: list[LayerRouting]


class Routings(Answer):
    """Answer of `POST /v1/routing`, in the order of the input."""

    object: Literal["list"]
    model: str
    num_experts: int
    top_k: int
    data: list[TextRouting]
    usage: PromptUsage


def embedding_body(index: int, values: Sequence[float], encoding_format: str) -> dict[str, Any]:
    """An `Embedding`."""
    packed = struct.pack(f"<{len(values)}f", *values)
    embedding = list(values) if encoding_format == "float" else base64.b64encode(packed).decode()
    return {"object": "embedding", "index": index, "embedding": embedding}


def list_body(model: str, data: list[Any], prompt_tokens: int) -> dict[str, Any]:
    """What `Embeddings` and `Routings` share."""
    counts = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "model": model, "data": data, "usage": counts}


def text_routing(
    index: int,
    token_ids: Sequence[int],
    layers: Iterable[tuple[int, tuple[list[list[int]], list[list[float]]]]],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """A `TextRouting`, given experts and weights of each MoE layer with the layer's index."""
    return {
        "object": "routing",
        "index": index,
        "token_ids": list(token_ids),
        "tokens": [token_name(tokenizer.decode([token_id]), token_id) for token_id in token_ids],
        "layers": [
            {"layer": layer, "experts": experts, "weights": weights} for layer, (experts, weights) in layers
        ],
    }
