"""Whatever is written behind a key of a recipe, it is taken or refused, with the key; and what is
taken can be planned with. Neither ends in a traceback.
"""

import itertools
from contextlib import suppress

import pytest
from cdpo.engine.basics.errors import EXIT_DEFECT, RecipeError
from cdpo.engine.ranks import launch
from cdpo.engine.recipe.keys import SCHEMA, is_knob
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.train import dry_run
from refusals import refused

VALUES = {
    "huge": ("1e39", "1e400", "10000000000", "1" + "0" * 400, "1" + "0" * 5000, "4294967295"),
    "tiny": ("1e-50", "1e-400", "0", "0.0"),
    "negative": ("-1", "-1e39", "-1" + "0" * 30, "-0.0", "-.inf"),
    "not a number": (".nan", ".inf", "[.nan, .nan]", "[1e39, 1e400]", "[-1, 10000000000]"),
    "text": ("text", '""', '" "', '"\\0"', '"\\ud800"', "é\u202e", "x" * 5000, "0x10", "1_000"),
    "another type": ("true", "null", "[]", "[1]", "[[1]]", "{}", "{a: 1}", '["", "\\0"]'),
}
KEYS = [key for key in SCHEMA if "[]" not in key]  # those inside lists are written in the file


def outcome(path, key, value):
    """The recipe, or None if it is refused."""
    try:
        return load_recipe(path, [f"{key}={value}"])
    except RecipeError as error:
        assert str(error).strip() and all(len(line) < 2100 for line in str(error).splitlines())
        return None


@pytest.mark.parametrize("kind", VALUES)
def test_it_is_taken_or_refused(tiny_world, kind):
    """Of each kind one value a key, in turn."""
    values = itertools.cycle(VALUES[kind])
    taken = [key for key in KEYS if outcome(tiny_world / "recipe.yaml", key, next(values))]
    assert len(taken) < len(KEYS) / 2


@pytest.mark.long
@pytest.mark.parametrize("kind", VALUES)
def test_each_value_behind_each_key_is_taken_or_refused(tiny_world, kind):
    for key, value in itertools.product(KEYS, VALUES[kind]):
        outcome(tiny_world / "recipe.yaml", key, value)


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("train.optimizer.lr=1e39", "out-of-range"),
        ("train.optimizer.eps=1e-50", "out-of-range"),
        ("train.optimizer.lr=1e400", "non-finite"),
        ("train.optimizer.lr=.nan", "non-finite"),
        ("train.optimizer.lr=-0.0", "out-of-range"),
        ("objective.beta=1" + "0" * 400, "wrong-type"),
        ("train.steps=10000000000", "out-of-range"),
        ("curriculum.tiers=1001", "out-of-range"),
        ('model.path=""', "out-of-range"),
        ('run_dir="a\\0b"', "out-of-range"),
    ],
)
def test_what_no_network_computes_with_and_no_file_is_named(tiny_world, override, kind):
    with refused(RecipeError, kind, override.partition("=")[0]):
        load_recipe(tiny_world / "recipe.yaml", [override])


def planned(recipe, monkeypatch, capsys):
    """The exit code of a dry run."""
    left = []

    def leave(code):
        left.append(code)
        raise SystemExit(code)

    monkeypatch.setattr(launch, "leave", leave)
    monkeypatch.setattr(launch, "parse_command_line", lambda *_: Asked(recipe))
    with suppress(SystemExit):
        launch.run_verb("train", lambda *_: None, dry_run)
    told = "".join(capsys.readouterr())
    assert EXIT_DEFECT not in left and "Traceback" not in told, told
    return left


class Asked:
    dry_run, world_size = True, 1

    def __init__(self, recipe):
        self.recipe = recipe


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("model.path=" + "x" * 5000, 6),
        ("adapter.rank=4294967295", 6),
        ("train.steps=4294967295", None),
    ],
)
def test_what_is_taken_can_be_planned_with(tiny_world, monkeypatch, capsys, override, code):
    recipe = load_recipe(tiny_world / "recipe.yaml", [override])
    assert planned(recipe, monkeypatch, capsys) == [code] * (code is not None)


@pytest.mark.long
@pytest.mark.parametrize("section", ["model", "curriculum", "adapter", "objective", "train"])
def test_all_that_is_taken_can_be_planned_with(tiny_world, monkeypatch, capsys, section):
    keys = [key for key in KEYS if key.startswith(f"{section}.") and is_knob(SCHEMA[key])]
    for key, value in itertools.product(keys, itertools.chain(*VALUES.values())):
        if recipe := outcome(tiny_world / "recipe.yaml", key, value):
            planned(recipe, monkeypatch, capsys)
