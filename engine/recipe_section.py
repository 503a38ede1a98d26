"""What the sections of a recipe share: how strictly they read, and the types of their numbers."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _two(window: Any) -> Any:
    if isinstance(window, Sequence) and len(window) != 2:
        raise ValueError("a window is its start and its end, as in [0.0, 0.8]")
    return window


def _ordered(window: tuple[float, float]) -> tuple[float, float]:
    if window[0] >= window[1]:
        raise ValueError("the start must lie before the end, as in [0.0, 0.8]")
    return window


Window = Annotated[tuple[Fraction, Fraction], Field(strict=False), BeforeValidator(_two), AfterValidator(_ordered)]
"""Part of a trajectory, as fractions of its steps; 0 is pure noise."""


class Section(BaseModel):
    # Strict: "20" is no number.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch(cls, value: Any) -> Any:
        # No field is a switch, and true equals the 1 of a Literal.
        if isinstance(value, bool):
            raise ValueError("this field is not a switch; give its value")
        return value
