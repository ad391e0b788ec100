"""Models that were distilled to few steps: they take no guidance, and some losses undo them.

A denoising loss pulls a prediction to the mean of all images of its caption, where a distilled
model predicts one of them. A preference over shared noise has that pull for winner and loser alike:
to first order it cancels, and what is left is the difference of their images. A loss on winners
alone, or one that holds the loser back, keeps it (measured: docs/results.md, "a flow model of few
steps").

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

MOST_STEPS = 10  # Z-Image-Turbo is drawn in nine


def check_guidance(recipe: Recipe) -> None:
    """RecipeError, under the key in the recipe, for guidance of a model that takes none; of its
    files configs alone are read.
    """
    if hasattr(family_of(recipe.model), "takes_guidance"):
        refuse_guidance(recipe, *denoiser_and_index(recipe.model))


def refuse_guidance(recipe: Recipe, denoiser: Config, pipeline: Config) -> None:
    """The same, of configs that are there."""
    spec, name = recipe.model, unet_name(recipe.model)
    for section, sampler in recipe.samplers.items():
        key, guidance = f"{section}.sampler.guidance", sampler.guidance
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


def describe_few_steps(recipe: Recipe, denoiser: Config, pipeline: Config) -> list[tuple[str, str]]:
    """Warnings, for the head of a run, of what would undo a distillation; LCMs have their own loss.

    ``denoiser`` and ``pipeline`` are the configs of the model.
    """
    spec, objective = recipe.model, recipe.objective
    by_name = NAMES.search((spec.unet or spec.path).rstrip("/").rpartition("/")[2])
    if spec.backbone == "lcm" or not (by_name or not _takes_guidance(spec, denoiser, pipeline)):
        return []
    undoing = {
        f"objective.type={objective.type}": objective.type == "sft",
        f"objective.loser_gradient={objective.loser_gradient:g}": objective.loser_gradient < 1,
        f"objective.loser_safeguard={objective.loser_safeguard}": objective.loser_safeguard
        is not None,
    }
    name = unet_name(spec)
    told = [
        f"{name} was distilled to few steps, which {knob} undoes: images of a prompt become alike. "
        "Use type=diffusion_dpo with the whole gradient of the loser"
        for knob, given in undoing.items()
        if given
    ]
    told += [
        f"{section}.sampler.steps={sampler.steps} draws as nobody does with {name}, which was "
        "distilled to few steps: give as many as its makers do, 1 to 9"
        for section, sampler in recipe.samplers.items()
        if sampler.steps > MOST_STEPS
    ]
    return [("warning", text) for text in told]


def _takes_guidance(spec: Model, denoiser: Config, pipeline: Config) -> bool:
    told = getattr(family_of(spec), "takes_guidance", None)
    return told is None or bool(told(denoiser, pipeline))
