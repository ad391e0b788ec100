"""What the sections of a recipe are made of: bounded numbers, the strictness of a section, and the
sampler that several of them have.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _one_line(value: Any, of_union: ValidatorFunctionWrapHandler) -> Any:
    """One error of a value that may be of two kinds, instead of one a kind."""
    try:
        return of_union(value)
    except ValidationError:
        is_integer = type(value) is int
        kind = "out_of_range" if is_integer else "int_type"
        raise PydanticCustomError(kind, "should be auto or an integer, 1 or more") from None


PositiveIntOrAuto = Annotated[PositiveInt | Literal["auto"], WrapValidator(_one_line)]
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
LARGEST_INT = 2**32 - 1
SMALLEST, LARGEST = (float(x) for x in (np.finfo("f4").smallest_subnormal, np.finfo("f4").max))


class Section(BaseModel):
    """A part of a recipe: immutable, and strict about what it is given."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="after")
    @classmethod
    def _can_be_used(cls, value: Any) -> Any:
        """Networks compute with float32, where 1e39 is infinite and 1e-50 is nothing; integers are
        counted, multiplied and allocated by; and texts become names of files.
        """
        for one in value if isinstance(value, tuple) else (value,):
            if right := _what_it_should_be(one):
                raise PydanticCustomError("out_of_range", right)  # type: ignore[arg-type]
        return value


def _what_it_should_be(value: object) -> str | None:
    if type(value) is int and abs(value) > LARGEST_INT:
        return f"should be at most {LARGEST_INT}"
    is_number = type(value) is float and value != 0 and math.isfinite(value)
    if is_number and not SMALLEST <= abs(value) <= LARGEST:  # type: ignore[arg-type]
        return "should be a number that float32 holds, 1e-45 to 3e38"
    if type(value) is str and (not value or _NO_TEXT.search(value)):
        return "should be a text, without NUL and halves of characters"
    return None


class Sampler(Section):
    """How images are drawn: by DDIM without added noise, from an LCM by its own multistep rule,
    from a flow model by its folder's scheduler: Euler steps, of SANA DPM-Solver++.
    """

    steps: PositiveInt = 50
    """Denoiser calls per image; more is slower and closer to the model's distribution."""
    guidance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 7.5
    """Classifier-free guidance scale; 1 turns it off and halves the cost."""
