"""What keeps a recipe from going in rounds, and the recipe of each: that of a run of its own."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..basics.errors import RecipeError
from .adapter import against_a_start
from .model import Model
from .prepare import Generate, Masked
from .prompts import Prompts
from .schema import Recipe


def check_rounds(recipe: Recipe) -> None:
    """RecipeError for the first thing that keeps a recipe from going in rounds."""
    source, adapter = recipe.prepare.source, recipe.adapter
    if not isinstance(source, Generate | Masked):
        raise _unfit(
            "prepare.source.type",
            source.type,
            "rounds rank what the tuned model draws, and where pairs are read there is nothing to "
            "sample: use generate or masked, or train once",
        )
    if recipe.prompts.validation is None:
        raise RecipeError(
            "prompts.validation is not given: rounds need prompts that say whether a round has "
            "gained, apart from those that are trained on and those that compare reports; set it, "
            "e.g. to {fraction: 0.1}",
            "prompts.validation",
            "missing",
        )
    if adapter.dora:
        raise _unfit(
            "adapter.dora",
            "true",
            "the adapters of all rounds become one, and DoRAs have no sum: use dora=false",
        )
    if adapter.ema is not None:
        raise _unfit(
            "adapter.ema",
            f"{adapter.ema:g}",
            "rounds go on from the weights of a step, not from their average: use null",
        )
    if adapter.type == "full" and recipe.model.lcm_lora is not None:
        raise _unfit(
            "adapter.type",
            "full",
            "with model.lcm_lora a further round can go on from adapters alone: use lora",
        )
    if adapter.start is not None:
        raise _unfit(
            "adapter.start",
            adapter.start,
            "the first round begins from the base: leave it out",
        )
    if recipe.speed.rounding == "free":
        raise _unfit(
            "speed.rounding",
            "free",
            "the next round draws its candidates in the process that has trained, in which cuDNN "
            "keeps to the convolutions that were timed: use fixed",
        )
    if recipe.rounds.reference == "base":
        _check_base(recipe)
    for key in ("path", "manifest_sha256"):
        if (value := getattr(recipe.data, key)) is not None:
            raise _unfit(f"data.{key}", value, "every round makes shards of its own: leave it out")
    if recipe.compare.runs:
        raise _unfit(
            "compare.runs",
            f"{{{', '.join(recipe.compare.runs)}}}",
            "what is compared is the model after each round: leave it out, and compare with other "
            "runs afterwards",
        )


def _check_base(recipe: Recipe) -> None:
    """RecipeError for what cannot go on with the adapter of the round before."""
    for other in against_a_start(recipe.adapter, recipe.objective.reference_ema):
        raise _unfit(
            "rounds.reference",
            "base",
            f"every round goes on with one adapter, which does not go with {other}: use previous",
        )


def _unfit(key: str, value: str, reason: str) -> RecipeError:
    return RecipeError(f"{key}={value}: {reason}", key, "contradiction")


def folder_of_round(recipe: Recipe, number: int) -> Path:
    """The run folder of a round, the first of which is 1."""
    return Path(recipe.run_dir) / f"round-{number}"


def recipe_of_round(recipe: Recipe, number: int, prompts: Prompts, model: Model) -> Recipe:
    """The recipe of a round: a run that makes ``model``, which the rounds before have left, better.

    It is the whole recipe but for what makes a round one. ``prompts`` are the recipe's as they have
    been divided: the seed, by which they are, is another in each round. Noise and pairs of the
    first round are those of the recipe itself.
    """
    evaluate = recipe.evaluate
    if not evaluate.every:
        evaluate = evaluate.model_copy(update={"every": recipe.train.steps})
    # A round goes on from what the one before has merged; with an LCM-LoRA, from its adapters.
    formats = {"diffusers": recipe.adapter.type == "lora"}
    formats["merged"] = model.lcm_lora is None or "merged" in recipe.export.formats
    asked = tuple(name for name, wanted in formats.items() if wanted)
    return recipe.model_copy(
        update={
            "run_dir": str(folder_of_round(recipe, number)),
            "seed": _seed_of_round(recipe.seed, number),
            "model": model,
            "prompts": prompts,
            "evaluate": evaluate,
            "export": recipe.export.model_copy(update={"formats": asked}),
        }
    )


def _seed_of_round(seed: int, number: int) -> int:
    """No two rounds, of one seed or of two, share their noise."""
    if number == 1:
        return seed
    return int(hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:8], 16)
