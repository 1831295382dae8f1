"""`GET /v1/models`."""

from typing import Literal

from pydantic import Field

from moe_ray.section import Quantize
from moe_ray.serving.openai.base import Answer


class Model(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    step: int = Field(description="optimizer steps behind the weights; 0 for a Hugging Face folder")
    dtype: str = Field(description="type of the weights and the KV cache")
    quantize: Quantize = Field(description="scheme of the experts' weights")
    max_model_len: int = Field(description="most tokens of a prompt and its answer")


class ModelList(Answer):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class Status(Answer):
    """Answer of the health checks."""

    status: Literal["ok"]
