"""The base of everything that an `Analysis` is made of."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Frozen; unknown fields and numbers that JSON lacks are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
