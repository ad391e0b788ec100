"""Models that were distilled to few steps: guidance is nothing they take, and training undoes them.

A family some of whose models take no guidance says which, in a function ``takes_guidance`` of the
configs of the denoiser and the pipeline.
"""

from __future__ import annotations

import re

from ..basics.errors import RecipeError
from ..recipe import Model, Recipe
from . import family_of
from .checks import Config, unet_name
from .pipelines import denoiser_and_index

# Of models whose configs are those of what they were distilled from: 3.5 large turbo, SDXL Turbo
# and Lightning, Hyper-SD, FLUX.2 klein.
NAMES = re.compile(r"schnell|turbo|lightning|sprint|hyper-?sd|klein(?!-base)", re.IGNORECASE)


def check_guidance(recipe: Recipe) -> None:
    """RecipeError, under the key in the recipe, for guidance of a model that takes none; of its
    files configs alone are read.
    """
    if hasattr(family_of(recipe.model), "takes_guidance"):
        refuse_guidance(recipe, *denoiser_and_index(recipe.model))


def refuse_guidance(recipe: Recipe, denoiser: Config, pipeline: Config) -> None:
    """The same, of configs that are there."""
    spec, name = recipe.model, unet_name(recipe.model)
    for key, guidance in recipe.guidances.items():
        if guidance != 1 and not _takes_guidance(spec, denoiser, pipeline):
            raise RecipeError(
                f"{key}={guidance:g}, but {name}, which was distilled to few steps, takes no "
                f"guidance: use {key}=1",
                key,
                "unsupported",
            )
    default = Model.model_fields["embedded_guidance"].default
    if spec.embedded_guidance != default and not denoiser.get("guidance_embeds"):
        key = "model.embedded_guidance"
        raise RecipeError(
            f"{key}={spec.embedded_guidance:g} has no effect, as {name} embeds none: leave it out",
            key,
            "no-effect",
        )


def describe_few_steps(spec: Model, denoiser: Config, pipeline: Config) -> list[tuple[str, str]]:
    """A warning for the head of a run that would undo a distillation; LCMs have their own loss."""
    by_name = NAMES.search((spec.unet or spec.path).rstrip("/").rpartition("/")[2])
    if spec.backbone == "lcm" or not (by_name or not _takes_guidance(spec, denoiser, pipeline)):
        return []
    told = (
        f"{unet_name(spec)} was distilled to few steps, which a denoising loss undoes: its images "
        "blur. Better align the model it was distilled from; else few training steps on candidates "
        "of its own, drawn in as few steps (prepare.sampler.steps)"
    )
    return [("warning", told)]


def _takes_guidance(spec: Model, denoiser: Config, pipeline: Config) -> bool:
    told = getattr(family_of(spec), "takes_guidance", None)
    return told is None or bool(told(denoiser, pipeline))
