"""What the sections of a recipe are made of: bounded numbers, the strictness of a section, and the
sampler that several of them have.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of a recipe: immutable, and strict about what it is given."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Sampler(Section):
    """How images are drawn: by DDIM without added noise, from an LCM by its own multistep rule."""

    steps: PositiveInt = 50
    """Denoiser calls per image; more is slower and closer to the model's distribution."""
    guidance: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 7.5
    """Classifier-free guidance scale; 1 turns it off and halves the cost."""
