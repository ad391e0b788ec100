"""`prepare.source` of a recipe: which keys go with which type, and what is said otherwise."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cdpo.engine.recipe import Generate, Masked, Paired, Ranked, Recipe
from cdpo.engine.recipe.keys import KNOBS
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.recipe.reference import for_terminal

ROOT = Path(__file__).parents[3]
BY_SCORE = {"difficulty": "score_gap"}


def from_source(load: Callable[..., Recipe], source: object, *overrides: str) -> object:
    return load(*overrides, prepare={"source": source}, curriculum=BY_SCORE).prepare.source


def test_the_defaults_of_pairs_are_the_columns_of_pick_a_pic(load):
    source = from_source(load, {"type": "paired", "path": "p"})
    assert isinstance(source, Paired)
    assert (source.images, source.label, source.caption) == (
        ("jpg_0", "jpg_1"),
        "label_0",
        "caption",
    )
    assert source.best_image == "best_image_uid" and source.on_disagreement == "drop"


def test_sources_are_chosen_by_type_and_by_overrides(load):
    assert from_source(load, {"type": "generate"}) == Generate()
    ranked = from_source(load, {"type": "ranked", "path": "a.csv", "score": None})
    assert ranked == Ranked(path="a.csv", score=None)
    mine = ["type=paired", "path=p", "images=[winner,loser]", "label=null"]
    overrides = [f"prepare.source.{text}" for text in mine]
    paired = from_source(load, {"type": "generate"}, *overrides)
    assert paired == Paired(path="p", images=("winner", "loser"), label=None)


def test_masked_prompts_have_the_published_shares_and_one_a_tier(load):
    masked = from_source(load, {"type": "generate"}, "prepare.source.type=masked")
    assert masked == Masked(fractions=(0.9, 0.7, 0.5, 0.3, 0.1), same_noise=True)
    three = ["prepare.source.fractions=[1.0, 0.6, 0.2]", "curriculum.tiers=3"]
    source = from_source(load, {"type": "masked"}, *three)
    assert source == Masked(fractions=(1.0, 0.6, 0.2))


@pytest.mark.parametrize("kind", ["paired", "ranked"])
def test_a_resolved_recipe_holds_the_keys_of_its_type(load, tmp_path, kind):
    source = from_source(load, {"type": kind, "path": "p"})
    saved = yaml.safe_load((tmp_path / "resolved.yaml").read_text())["prepare"]["source"]
    assert set(saved) == set(type(source).model_fields)


@pytest.mark.parametrize(
    ("source", "key", "kind"),
    [
        ({}, ".type", "missing"),
        ({"type": "pairs"}, ".type", "unknown"),
        ({"type": "paired"}, ".path", "missing"),
        ("paired", "", "wrong-type"),
        ({"type": "paired", "path": 3}, ".path", "wrong-type"),
        ({"type": "paired", "path": "p", "images": ["a"]}, ".images[1]", "missing"),
        ({"type": "ranked", "path": "p", "label": "l"}, ".label", "contradiction"),
        ({"type": "ranked", "path": "p", "captoin": "s"}, ".captoin", "unknown"),
        ({"type": "ranked", "path": "p", "max_unreadable": -1}, ".max_unreadable", "out-of-range"),
        ({"type": "paired", "path": "p", "on_disagreement": "x"}, ".on_disagreement", "unknown"),
        ({"type": "ranked", "path": "p", "score": "overall_rank"}, "", "contradiction"),
        ({"type": "ranked", "path": "p", "score": "imageRank"}, "", "contradiction"),
        ({"type": "ranked", "path": "p", "score": None, "order": "lower"}, "", "contradiction"),
        ({"type": "paired", "path": "p", "scores": ["place_0", "b"]}, "", "contradiction"),
        ({"type": "paired", "path": "p", "order": "lower"}, "", "contradiction"),
        ({"type": "masked", "path": "p"}, ".path", "contradiction"),
        ({"type": "masked", "fractions": [0.1, 0.9]}, "", "contradiction"),
        ({"type": "masked", "fractions": [0.5, 0.5]}, "", "contradiction"),
        ({"type": "masked", "fractions": []}, "", "contradiction"),
        ({"type": "masked", "fractions": [1.5]}, ".fractions[0]", "out-of-range"),
        ({"type": "masked", "fractions": [0.5, 0]}, ".fractions[1]", "out-of-range"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(problems, source, key, kind):
    found = problems(prepare={"source": source}, curriculum=BY_SCORE)
    assert found == {f"prepare.source{key}": kind}


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ({"type": "masked", "fractions": [0.9, 0.1]}, {}),  # for five tiers
        ({"type": "paired", "path": "p"}, {"curriculum": {"difficulty": "rank_gap"}}),
        ({"type": "generate"}, {"prompts": {"heldout": "h"}}),
        ({"type": "masked"}, {"prompts": {"heldout": "h"}}),
        ({"type": "paired", "path": "p"}, {"prompts": {}}),
    ],
)
def test_a_source_goes_with_the_curriculum_and_the_prompts(problems, tmp_path, source, changes):
    found = problems(**{"prepare": {"source": source}, "curriculum": BY_SCORE} | changes)
    assert found == {str(tmp_path / "r.yaml"): "contradiction"}


def test_a_column_that_is_called_like_a_rank_is_taken_where_its_order_is_said(load):
    for order in ("higher", "lower"):
        ranked = {"type": "ranked", "path": "p", "score": "rank", "order": order}
        assert from_source(load, ranked).order == order
    from_source(load, {"type": "ranked", "path": "p", "score": "frankness"})


def test_pairs_need_no_prompts_to_train_on(load):
    paired = {"source": {"type": "paired", "path": "p"}}
    recipe = load(prepare=paired, curriculum=BY_SCORE, prompts={"heldout": "h"})
    assert recipe.prompts.train is None


def test_every_recipe_shows_the_type_and_help_shows_the_keys_of_all_types():
    assert [key for key in KNOBS if key.startswith("prepare.source")] == ["prepare.source.type"]
    for key in ("on_disagreement", "score", "max_unreadable", "label", "fractions"):
        assert f"\n  prepare.source.{key} = " in for_terminal()


def test_the_recipe_for_pick_a_pic_gives_the_defaults(monkeypatch):
    monkeypatch.chdir(ROOT)
    source = load_recipe("recipes/pickapic_sd15_cdpo.yaml").prepare.source
    assert source == Paired(path=source.path)
