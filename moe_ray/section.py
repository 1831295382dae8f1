"""What all sections of the settings share: the base class and the kinds of values."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

NonNegativeFloat = Annotated[float, Field(ge=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
# Bounds far above any use, so that a slip of the hand is an error and not an endless loop or all of the memory.
PositiveInt = Annotated[int, Field(gt=0, le=2**40)]
Count = Annotated[int, Field(gt=0, le=65_536)]
Width = Annotated[int, Field(gt=0, le=2**20)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Factor = Annotated[float, Field(gt=0, le=2**20)]
Dtype = Literal["float32", "bfloat16"]
Quantize = Literal["none", "int8", "int4"]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `on` and `yes` are true, which would count as 1."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise PydanticCustomError("not_bool", "input should be no truth value")
        return value
