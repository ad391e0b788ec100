"""What is written from the schema: the page, the file for editors, a run's commented recipe."""

import json
import re
from pathlib import Path

import pytest
from cdpo.engine.basics import shipped
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe import Recipe, reference
from cdpo.engine.recipe.keys import SCHEMA, is_knob
from cdpo.engine.recipe.reference import annotated, json_schema, markdown
from cdpo.engine.recipe.yaml_subset import Source

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def fits():
    """Whether an editor with recipes/schema.json finds nothing wrong with a recipe."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "recipes" / "schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid


def test_both_files_are_what_the_schema_gives(tmp_path, monkeypatch):
    """If not: python -m cdpo.engine.recipe.reference"""
    monkeypatch.setattr(reference, "shipped", lambda folder: tmp_path / folder)
    reference.main()
    for name in ("docs/recipe.md", "recipes/schema.json"):
        assert (tmp_path / name).read_bytes() == (shipped.shipped(".") / name).read_bytes(), name


def test_the_page_tells_of_every_knob():
    page = markdown()
    assert "one of those below" in page and "as `reward`" in page
    for key in (key for key, info in SCHEMA.items() if is_knob(info)):
        assert re.search(rf"^\| `(\S*\.)?{key.rpartition('.')[2]}` \|", page, re.M), key


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_editors_find_nothing_wrong_with_shipped_recipes(fits, path):
    assert fits(Source("").read(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"adapter": {"targets": ["to_q"]}},
        {"prompts": {"train": {"templates": ["a"]}, "heldout": {"count": 3}}},
        {"reward": {"type": "colorfulness"}},
        {"reward": {"type": "vote", "rewards": [{"reward": {"path": "p"}}]}},
        {"compare": {"judge": None, "rewards": [{"path": "p"}], "runs": {"a": "b"}}},
        {"train": {"stpes": 3}},
        {"trains": {}},
        {"train": {"precision": "fp8"}},
        {"train": {"optimizer": {"betas": [0.9]}}},
        {"train": {"steps": "3"}},
        {"train": {"steps": 0}},
        {"adapter": {"targets": "to_q"}},
        {"reward": {}},
        {"reward": {"path": "p", "head": "h"}},
        {"reward": {"type": "beauty", "path": "p"}},
        {"reward": {"type": "hps", "path": "p", "revision": "r"}},
        {"compare": {"judge": {"type": "python"}}},
        {"prepare": {"source": {"path": "p"}}},
        {"prompts": {"train": {"count": 3}}},
    ],
)
def test_editors_refuse_what_the_engine_refuses(fits, load, minimal, change):
    try:
        load(**change)
    except RecipeError:
        assert not fits(minimal | change)
    else:
        assert fits(minimal | change)


def test_every_key_of_the_schema_for_editors_is_explained():
    sections = [json_schema(), *json_schema()["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for key, value in section["properties"].items():
            assert value.get("description"), key


def test_a_runs_recipe_says_what_each_value_is_for(minimal):
    recipe = Recipe.model_validate(minimal | {"objective": {"beta": 5000}})
    lines = annotated(recipe).splitlines()
    place = lines.index("  steps: 10000")
    assert lines[place - 1] == "  # Optimiser steps in all (skipped ones do not count)."
    assert lines[place - 2] == "train:"
    again = Recipe.model_validate(
        minimal | {"objective": {"beta": 5000.0}, "adapter": {"alpha": 8}}
    )
    assert again == recipe and annotated(again) == annotated(recipe)
    assert max(map(len, lines)) <= 100
