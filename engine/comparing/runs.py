"""The runs that `compare` holds against one base: its own, or those that `compare.runs` lists."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

from ..basics.errors import DataError, RecipeError
from ..models import Backbone
from ..recipe import Model, Recipe
from ..recipe.reading import load_recipe
from ..training.export_formats import FOLDERS
from ..training.exports import AVERAGES
from ..training.log import MetricsFile, both_errors_rise
from .report.content import TUNED, RunFacts

# What decides the images of an untuned model; teachers and solvers belong to training.
SAME_MODEL = ("backbone", "path", "revision", "variant", "vae", "unet", "lcm_lora", "resolution")
# What tells methods apart.
METHOD = (
    "objective.type",
    "objective.beta",
    "curriculum.order",
    "curriculum.tiers",
    "curriculum.steps_per_tier",
    "train.steps",
    "train.optimizer.lr",
    "adapter.type",
    "adapter.rank",
)


@dataclass(frozen=True)
class ComparedRun:
    """A finished run under the name that tables give it."""

    name: str
    recipe: Recipe
    """Its own, with the folder it lies in now and the `compare` section of who compares."""
    weights: str
    """sha256 of what it exported."""

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.recipe.run_dir)

    def facts(self) -> RunFacts:
        """What made it, and whether its training warned."""
        metrics = MetricsFile(self.folder / "metrics.jsonl").read()
        rose = both_errors_rise(metrics, self.recipe.train.log_every)
        return RunFacts(self.name, self.recipe.run_dir, method_of(self.recipe), rose)


def read_runs(recipe: Recipe) -> list[ComparedRun]:
    """All runs of a comparison, in their order.

    DataError or RecipeError, in one line, for a folder that is no finished run, and for a run of
    another model.
    """
    if not recipe.compare.runs:
        return [ComparedRun(TUNED, recipe, tuned_hash(recipe))]
    return [_read_run(recipe, name, folder) for name, folder in recipe.compare.runs.items()]


def method_of(recipe: Recipe) -> dict[str, str | int | float | None]:
    """What tells methods apart, by dotted keys."""
    return {key: attrgetter(key)(recipe) for key in METHOD}


def _read_run(recipe: Recipe, name: str, folder: str) -> ComparedRun:
    key = f"compare.runs.{name}"
    run = f"{key}={folder}"
    resolved = Path(folder) / "recipe.yaml"
    if not resolved.is_file():
        message = f"{run} is no run folder: it holds no recipe.yaml, which train writes"
        raise DataError(message, key, "missing")
    try:
        own = load_recipe(resolved)
    except RecipeError as error:
        first, *others = str(error).splitlines()
        more = f" (and {len(others)} more)" if others else ""
        message = f"{run}: its recipe.yaml cannot be taken: {first}{more}"
        raise RecipeError(message, key, "damaged") from None
    _refuse_other_model(key, folder, recipe.model, own.model)
    if recipe.compare.weights == "ema" and own.adapter.ema is None:
        raise DataError(
            f"{run} keeps no moving average (its adapter.ema is null): use compare.weights=last",
            key,
            "contradiction",
        )
    moved = own.model_copy(update={"run_dir": folder, "compare": recipe.compare})
    return ComparedRun(name, moved, tuned_hash(moved))


def _refuse_other_model(key: str, folder: str, here: Model, there: Model) -> None:
    for name in SAME_MODEL:
        ours, theirs = getattr(here, name), getattr(there, name)
        if _located(ours) != _located(theirs):
            raise DataError(
                f"{key}={folder} was tuned from another model: its model.{name} is "
                f"{_shown(theirs)}, here it is {_shown(ours)}; runs are compared with one base",
                key,
                "mismatch",
            )


def _located(value: object) -> object:
    """A folder by where it is, however its path is written."""
    if isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())
    return value


def _shown(value: object) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)


def load_tuned(recipe: Recipe, backbone: Backbone) -> None:
    """Put what a finished run exported into a fresh backbone, as any user of it would."""
    folder = tuned_folder(recipe)
    if folder.name == FOLDERS["merged"]:
        backbone.load_denoiser(folder)
    else:
        backbone.load_adapter(folder)


def tuned_folder(recipe: Recipe) -> Path:
    """The export that stands for a run; of several equal ones the smallest. DataError if none."""
    kind = AVERAGES if recipe.compare.weights == "ema" else ""
    form = min(recipe.export.formats, key=list(FOLDERS).index)
    folder = Path(recipe.run_dir) / kind / FOLDERS[form]
    if not folder.is_dir():
        raise DataError(f"no tuned weights in {folder}: run train first", str(folder), "missing")
    return folder


def tuned_hash(recipe: Recipe) -> str:
    """sha256 over the weights files of :func:`tuned_folder`."""
    digest = hashlib.sha256()
    for path in sorted(tuned_folder(recipe).rglob("*.safetensors")):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
