"""`GET /v1/models`."""

from typing import Any, Literal

from moe_ray.serving.openai.base import Answer


class Model(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    step: int


class ModelList(Answer):
    """All models that are served: one."""

    object: Literal["list"]
    data: list[Model]


class Status(Answer):
    """Answer of the health checks."""

    status: Literal["ok"]


def model_body(name: str, created: int, step: int) -> dict[str, Any]:
    """A `Model`; `step` says which checkpoint of its run answers, 0 for a Hugging Face folder."""
    return {"id": name, "object": "model", "created": created, "owned_by": "moe_ray", "step": step}
