"""The runs that `compare` holds against one base: its own, or those that `compare.runs` lists."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import torch

from ..basics.errors import DataError, RecipeError, told_by
from ..models import Backbone, known_fingerprints, load_backbone
from ..models.fingerprints import changed_parts, named
from ..recipe import Model, Recipe
from ..recipe.identity import Change
from ..recipe.reading import load_recipe
from ..training.export_formats import FOLDERS
from ..training.exports import AVERAGES, read_stamp
from ..training.log import MetricsFile, both_errors_rise
from .report.content import TUNED, RunFacts

# What decides the images of an untuned model; teachers and solvers belong to training.
SAME_MODEL = ("backbone", "resolution")
# And of a run that does not tell the parts it was tuned from.
SAME_NAMES = ("path", "revision", "variant", "vae", "unet", "lcm_lora")
# Parts that have no share in the images, or that has none in training, or that each recipe decides
# for itself as it does the precision.
OF_ONE_SIDE = ("teacher", "teacher_config", "sampler", "quantization")
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

    @property
    def chosen(self) -> tuple[str | None, int | None]:
        """Who chose the step whose weights it exported, None where that is the last; which step."""
        exported = read_stamp(self.folder)
        return exported.get("chosen_by"), exported.get("step")

    def facts(self) -> RunFacts:
        """What made it, and whether its training warned."""
        metrics = MetricsFile(self.folder / "metrics.jsonl").read()
        rose = both_errors_rise(metrics, self.recipe.train.log_every)
        told, method = read_stamp(self.folder), method_of(self.recipe)
        changes = [str(Change(**made)) for made in told.get("changes", [])]
        return RunFacts(
            self.name, self.recipe.run_dir, method, rose, changes, told.get("rounds", [])
        )


def read_runs(recipe: Recipe, device: torch.device) -> list[ComparedRun]:
    """All runs of a comparison, in their order; models whose content is not known are read on
    ``device``.

    DataError or RecipeError, in one line, for a folder that is no finished run, and for a run of
    another model.
    """
    if not recipe.compare.runs:
        own = ComparedRun(TUNED, recipe, tuned_hash(recipe))
        _refuse_other_parts("run_dir", recipe, own.folder, device)
        return [own]
    return [_read_run(recipe, *run, device) for run in recipe.compare.runs.items()]


def parts_of(model: Model, device: torch.device, precision: str) -> dict[str, str]:
    """Fingerprints of a recipe's model in a precision; it is read only if they are not known."""
    known = known_fingerprints(model, precision)
    return known or load_backbone(model, device, precision).fingerprints()


def method_of(recipe: Recipe) -> dict[str, str | int | float | None]:
    """What tells methods apart, by dotted keys."""
    return {key: attrgetter(key)(recipe) for key in METHOD}


def _read_run(recipe: Recipe, name: str, folder: str, device: torch.device) -> ComparedRun:
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
    _refuse_other_model(key, folder, recipe.model, own.model, SAME_MODEL)
    if not _refuse_other_parts(key, recipe, Path(folder), device):
        _refuse_other_model(key, folder, recipe.model, own.model, SAME_NAMES)
    if recipe.compare.weights == "ema" and own.adapter.ema is None:
        raise DataError(
            f"{run} keeps no moving average (its adapter.ema is null): use compare.weights=last",
            key,
            "contradiction",
        )
    moved = own.model_copy(update={"run_dir": folder, "compare": recipe.compare})
    return ComparedRun(name, moved, tuned_hash(moved))


def _refuse_other_parts(key: str, recipe: Recipe, run: Path, device: torch.device) -> bool:
    """DataError if a run was tuned from other parts than the recipe's model has; whether it tells
    them, as runs do since there are parts.
    """
    exported = read_stamp(run)
    if not exported.keys() >= {"parts", "precision"}:
        return False
    then, precision = exported["parts"], exported["precision"]
    now = parts_of(recipe.model, device, precision)
    others = [part for part in changed_parts(then, now) if part not in OF_ONE_SIDE]
    if others:
        raise DataError(
            f"{key}={run} was tuned from another {named(others)} than the recipe's model has: "
            "bring back the files, or compare with a recipe of that model; runs are compared with "
            "one base",
            key,
            "mismatch",
        )
    return True


def _refuse_other_model(
    key: str, folder: str, here: Model, there: Model, names: Sequence[str]
) -> None:
    for name in names:
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
    is_merged = folder.name == FOLDERS["merged"]
    try:
        (backbone.load_denoiser if is_merged else backbone.load_adapter)(folder)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the tuned weights in {folder} cannot be read: {told_by(error)}; remove the folder, "
            "and train writes it again",
            str(folder),
            "unreadable",
        ) from None


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
