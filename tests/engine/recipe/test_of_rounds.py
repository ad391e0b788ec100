"""Which recipes go in rounds, and what the recipe of a round is."""

from __future__ import annotations

import re

import pytest
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe import Prompts
from cdpo.engine.recipe.command_line import parse_command_line
from cdpo.engine.recipe.of_rounds import check_rounds, recipe_of_round
from refusals import refused

VALIDATION = "prompts.validation={count: 2}"


@pytest.mark.parametrize(
    ("kind", "key", "overrides"),
    [
        (
            "contradiction",
            "prepare.source.type",
            "prepare.source.type=paired prepare.source.path=pairs curriculum.difficulty=score_gap",
        ),
        (
            "contradiction",
            "prepare.source.type",
            "prepare.source.type=ranked prepare.source.path=images",
        ),
        ("missing", "prompts.validation", "prompts.validation=null"),
        ("out-of-range", None, "rounds.count=0"),
        ("contradiction", "adapter.dora", "adapter.dora=true"),
        ("contradiction", "adapter.ema", "adapter.ema=0.9"),
        ("contradiction", "adapter.start", "adapter.start=lora"),
        ("contradiction", "speed.rounding", "speed.rounding=free"),
        *(
            ("contradiction", "rounds.reference", f"rounds.reference=base {other}")
            for other in (
                "objective.reference_ema=0.9",
                "adapter.opening=inside_out",
                "adapter.type=full export.formats=[merged]",
            )
        ),
        ("contradiction", "data.path", "data.path=elsewhere"),
        ("contradiction", "compare.runs", "compare.runs={a:b}"),
        (
            "contradiction",
            "adapter.type",
            "adapter.type=full export.formats=[merged] model.backbone=lcm model.lcm_lora=x "
            "objective.type=consistency_dpo",
        ),
    ],
)
def test_what_cannot_go_in_rounds_is_refused_as_the_command_line_is_read(
    tiny_world, kind, key, overrides
):
    """In one line, before a folder is made; the other verbs take what rounds do not."""
    asked = ["--recipe", str(tiny_world / "recipe.yaml"), VALIDATION, *overrides.split()]
    asked = [text.replace("{a:b}", "{a: b}") for text in asked]
    wording = "rounds-of-pairs-that-are-read" if "paired" in overrides else None
    with refused(RecipeError, kind, key, wording=wording) as told:
        parse_command_line("rounds", asked)
    assert "\n" not in str(told.value) and told.value.exit_code == 2
    if kind != "out-of-range":
        parse_command_line("train", asked)


def test_without_a_reward_nobody_says_whether_a_round_has_gained(tiny_world, tmp_path):
    text = (tiny_world / "recipe.yaml").read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text(re.sub(r"^reward:\n  path: .*\n", "", text, flags=re.M))
    with refused(RecipeError, "missing", "reward"):
        parse_command_line("rounds", ["--recipe", str(path), VALIDATION])


@pytest.mark.parametrize("source", ["generate", "masked"])
def test_what_is_sampled_can(tiny_recipe, source):
    fractions = ["prepare.source.fractions=[0.9, 0.5, 0.1]"] if source == "masked" else []
    check_rounds(tiny_recipe(VALIDATION, f"prepare.source.type={source}", *fractions))


def test_a_round_is_the_recipe_but_for_what_makes_it_one(tiny_recipe):
    recipe = tiny_recipe(VALIDATION, "export.formats=[kohya]")
    prompts, left = Prompts(train="t", validation="v"), {"unet": "round-1/merged/unet"}
    model = recipe.model.model_copy(update=left)
    first = recipe_of_round(recipe, 1, prompts, recipe.model)
    second, third = (recipe_of_round(recipe, n, prompts, model) for n in (2, 3))
    other = recipe_of_round(tiny_recipe(VALIDATION, "seed=4"), 2, prompts, model)
    assert first.seed == recipe.seed
    assert len({each.seed for each in (first, second, third, other)}) == 4
    assert second.run_dir == f"{recipe.run_dir}/round-2" and second.model == model
    assert second.evaluate.every == recipe.train.steps and second.prompts == prompts
    assert second.export.formats == ("diffusers", "merged")
    same = set(type(recipe).model_fields) - {
        *("run_dir", "seed", "model", "prompts", "evaluate", "export")
    }
    assert all(getattr(second, name) == getattr(recipe, name) for name in same)
