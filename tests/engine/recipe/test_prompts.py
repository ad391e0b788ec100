"""`prompts` of a recipe: forms of its values, in files and overrides, and what is wrong there."""

import pytest
from cdpo.engine.recipe import Prompts, Split, Templates
from cdpo.engine.recipe.reference import for_terminal

ANIMALS = {"templates": ["a {x}"], "lists": {"x": ["dog", "cat"]}}


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"train": "t"}, Prompts(train="t")),
        (
            {"train": ANIMALS, "heldout": {"count": 3}},
            Prompts(
                train=Templates(templates=("a {x}",), lists={"x": ("dog", "cat")}),
                heldout=Split(count=3),
            ),
        ),
        (
            {"train": "t.csv", "column": "c", "heldout": {**ANIMALS, "lists": {"x": "x.txt"}}},
            Prompts(
                train="t.csv",
                column="c",
                heldout=Templates(templates=("a {x}",), lists={"x": "x.txt"}),
            ),
        ),
    ],
)
def test_forms_are_told_apart_by_their_keys_and_read_back_from_a_run_folder(
    load, prompts, expected
):
    assert load(prompts=prompts).prompts == expected


def test_overrides_change_a_part_or_the_form(load):
    def changed(override: str, train: object = ANIMALS) -> Prompts:
        return load(override, prompts={"train": train}).prompts

    assert changed("prompts.train=t.txt").train == "t.txt"
    assert changed("prompts.heldout.fraction=0.5", "t").heldout == Split(fraction=0.5)
    assert changed("prompts.heldout={count: 3}", "t").heldout == Split(count=3)
    photo = changed("prompts.train.templates=['a photo of a {x}']").train
    assert photo == Templates(templates=("a photo of a {x}",), lists={"x": ("dog", "cat")})
    other = changed("prompts.train.lists={x: [cow]}").train
    assert isinstance(other, Templates) and other.lists == {"x": ("cow",)}


@pytest.mark.parametrize(
    ("prompts", "key", "kind"),
    [
        ({"train": 5}, ".train", "wrong-type"),
        ({"train": ["t"]}, ".train", "wrong-type"),
        ({"train": {}}, ".train.templates", "missing"),
        ({"train": {**ANIMALS, "fraction": 0.5}}, ".train.fraction", "unknown"),
        ({"train": {**ANIMALS, "list": 1}}, ".train.list", "unknown"),
        ({"train": {"templates": []}}, ".train.templates", "out-of-range"),
        ({"train": {"templates": ["a {x}"]}}, ".train", "contradiction"),
        ({"train": {"templates": ["a"], "lists": {"y": ["b"]}}}, ".train", "contradiction"),
        ({"train": {"templates": ["a {x}"], "lists": {"x": [1]}}}, ".train.lists.x", "wrong-type"),
        ({"train": {"templates": ["a {x.y}"], "lists": {}}}, ".train.templates", "contradiction"),
        ({"train": {"templates": ["a }"], "lists": {}}}, ".train.templates", "contradiction"),
        ({"heldout": {"count": 3}}, "", "contradiction"),
        ({"train": "t", "heldout": {"fraction": 1}}, ".heldout.fraction", "out-of-range"),
        ({"train": "t", "heldout": {"count": 0}}, ".heldout.count", "out-of-range"),
        ({"train": "t", "heldout": {"count": 1, "fraction": 0.5}}, ".heldout", "contradiction"),
        ({"train": "t", "heldout": {"count": 1, "seed": 2}}, ".heldout.seed", "unknown"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(problems, prompts, key, kind):
    assert problems(prompts=prompts) == {f"prompts{key}": kind}


def test_help_lists_the_keys_of_every_form():
    shown = for_terminal()
    for key in ("train", "train.templates", "train.lists", "heldout.fraction", "heldout.count"):
        assert f"\n  prompts.{key} = " in shown
