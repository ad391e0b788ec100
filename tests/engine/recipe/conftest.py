"""Recipes of a few keys, written, read, saved and read again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.identity import save_resolved
from cdpo.engine.recipe.reading import load_recipe

MINIMAL: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {"path": "m"},
    "prompts": {"train": "t"},
    "reward": {"path": "r"},
}


@pytest.fixture
def minimal() -> dict[str, Any]:
    """The sections that must be given."""
    return MINIMAL


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Recipe]:
    """The smallest recipe with other ``sections``, which is what its resolved copy says as well."""

    def load(*overrides: str, **sections: object) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(json.dumps(MINIMAL | sections))  # which is YAML
        recipe = load_recipe(path, overrides)
        save_resolved(recipe, tmp_path / "resolved.yaml")
        assert load_recipe(tmp_path / "resolved.yaml") == recipe
        return recipe

    return load


@pytest.fixture
def problems(load: Callable[..., Recipe]) -> Callable[..., dict[str, str]]:
    """Kind by key of what is wrong with such a recipe."""

    def problems(*overrides: str, **sections: object) -> dict[str, str]:
        with pytest.raises(RecipeError) as caught:
            load(*overrides, **sections)
        return {key: kind for key, kind, _ in caught.value.problems}

    return problems
