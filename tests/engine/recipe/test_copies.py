"""Copies of shipped recipes: the same run, of its own name and in its own folder."""

from pathlib import Path

import pytest
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe.copies import copy_recipe, recipe_names
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.sources.prompts import read_prompts
from refusals import refused

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_in_the_clone_differs_by_its_own_name_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "my own.yaml"
    copy_recipe(name, path)
    copy, original = load_recipe(path), load_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert copy.model_copy(update={"run_dir": original.run_dir}) == original
    assert copy.run_dir.startswith("runs/") and copy.run_dir.endswith("/my own")
    text = path.read_text(encoding="utf-8")
    assert f"recipes/{name}.yaml" not in text and f"engine/train.py   --recipe '{path}'" in text
    assert f"$schema={(ROOT / 'recipes' / 'schema.json').as_uri()}" in text.splitlines()[0]


@pytest.mark.parametrize("name", recipe_names())
def test_a_copy_elsewhere_finds_what_comes_with_cdpo(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_recipe(name, "mine.yaml")
    recipe = load_recipe("mine.yaml")
    assert any(read_prompts(recipe.prompts, recipe.seed))
    assert not recipe.model.path.startswith("assets/")


def test_no_two_copies_share_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a.yaml", "b/a.yaml", "b/c.yaml"):
        copy_recipe("sd15_cdpo", path)
    copied = [load_recipe(path).run_dir for path in ("a.yaml", "b/a.yaml", "b/c.yaml")]
    assert copied == ["runs/a", "runs/b/a", "runs/b/c"]


def test_unknown_names_and_files_that_are_there_are_refused(tmp_path):
    mine = tmp_path / "mine.yaml"
    with refused(RecipeError, "unknown", "sdxl") as caught:
        copy_recipe("sdxl", mine)
    assert all(name in str(caught.value) for name in recipe_names())
    with refused(RecipeError, "unknown", "../recipes/sd15_cdpo"):
        copy_recipe("../recipes/sd15_cdpo", mine)
    mine.write_text("seed: 1")
    with refused(RecipeError, "in-use", str(mine)):
        copy_recipe("sdxl_cdpo", mine)
    assert mine.read_text() == "seed: 1"
