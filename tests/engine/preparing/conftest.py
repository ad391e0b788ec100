"""Runs of stage 1 that tests of all kinds of sources look at."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import preferences
import pytest
import torch
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.reading import load_recipe
from prepared import OVERRIDES, ROWS, prepare


@pytest.fixture(scope="session")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of the Pick-a-Pic form."""
    folder = tmp_path_factory.mktemp("pickapic")
    preferences.write_parquet(folder / "train-0.parquet", ROWS[:40])
    preferences.write_parquet(folder / "train-1.parquet", ROWS[40:])
    return folder


@pytest.fixture(scope="session")
def load(tiny_world: Path, parquet: Path) -> Callable[..., Recipe]:
    """The tiny recipe of a kind of source."""

    def recipe(kind: str, run_dir: Path, *overrides: str) -> Recipe:
        path = [f"prepare.source.path={parquet}"] if kind == "paired" else []
        mine = [f"run_dir={run_dir}", *OVERRIDES[kind], *path, *overrides]
        return load_recipe(tiny_world / "recipe.yaml", mine)

    return recipe


@pytest.fixture(scope="session")
def made(
    load: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The run folder of an undisturbed stage 1 of a kind: not to be written to."""

    @cache
    def run(kind: str) -> Path:
        run_dir = tmp_path_factory.mktemp(kind) / "run"
        prepare(load(kind, run_dir), Ranks(0, 1, 0, torch.device("cpu")))
        return run_dir

    return run
