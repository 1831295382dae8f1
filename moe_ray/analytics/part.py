"""The base of everything that an `Analysis` is made of."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

# Six digits are more than any statistic has, and half of what JSON would take for all of them.
Real = Annotated[float, AfterValidator(lambda value: float(f"{value:.6g}"))]


class Part(BaseModel):
    """Frozen; unknown fields and numbers that JSON lacks are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
