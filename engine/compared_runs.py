"""The runs that `compare` holds against one base: its own, or those that `compare.runs` lists."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .basics.errors import DataError, RecipeError
from .recipe import Model, Recipe
from .recipe.reading import load_recipe
from .reporting.metric_rows import both_errors_rose
from .reporting.report_data import TUNED, RunFacts
from .training.exports import tuned_hash
from .training.log import MetricsFile

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
        rose = both_errors_rose(metrics)
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
    found = {}
    for key in METHOD:
        section, _, knob = key.rpartition(".")
        value: object = recipe
        for name in (*section.split("."), knob):
            value = getattr(value, name)
        assert value is None or isinstance(value, str | int | float)
        found[key] = value
    return found


def _read_run(recipe: Recipe, name: str, folder: str) -> ComparedRun:
    key = f"compare.runs.{name}={folder}"
    resolved = Path(folder) / "recipe.yaml"
    if not resolved.is_file():
        raise DataError(f"{key} is no run folder: it holds no recipe.yaml, which train writes")
    try:
        own = load_recipe(resolved)
    except RecipeError as error:
        first, *others = str(error).splitlines()
        more = f" (and {len(others)} more)" if others else ""
        raise RecipeError(f"{key}: its recipe.yaml cannot be taken: {first}{more}") from None
    _refuse_other_model(key, recipe.model, own.model)
    if recipe.compare.weights == "ema" and own.adapter.ema is None:
        raise DataError(
            f"{key} keeps no moving average (its adapter.ema is null): use compare.weights=last"
        )
    moved = own.model_copy(update={"run_dir": folder, "compare": recipe.compare})
    return ComparedRun(name, moved, tuned_hash(moved))


def _refuse_other_model(key: str, here: Model, there: Model) -> None:
    for name in SAME_MODEL:
        ours, theirs = getattr(here, name), getattr(there, name)
        if _located(ours) != _located(theirs):
            raise DataError(
                f"{key} was tuned from another model: its model.{name} is {_shown(theirs)}, here "
                f"it is {_shown(ours)}; runs are compared with one base"
            )


def _located(value: object) -> object:
    """A folder by where it is, however its path is written."""
    if isinstance(value, str) and Path(value).exists():
        return str(Path(value).resolve())
    return value


def _shown(value: object) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
