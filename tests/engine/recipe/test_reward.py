"""Rewards in recipes: a `type` chooses, keys of other types are refused, old recipes stay valid."""

import json
import re
from pathlib import Path

import pytest
import yaml
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.identity import save_resolved
from cdpo.engine.recipe.keys import types_of
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.recipe.reference import for_terminal
from cdpo.engine.recipe.reward import ClipScoreSpec, WeightedSpec

BASE = {"run_dir": "r", "model": {"path": "m"}, "prompts": {"train": "t"}}
TYPES = ", ".join(types_of("reward")[:-3])  # all but `python` and the two of several rewards


@pytest.fixture
def load(tmp_path):
    def load(reward: object, *overrides: str, judge: object = None) -> Recipe:
        path = tmp_path / "r.yaml"
        values = BASE | {"reward": reward, "compare": {"judge": judge}}
        path.write_text(json.dumps(values))  # which is YAML
        recipe = load_recipe(path, overrides)
        save_resolved(recipe, tmp_path / "resolved.yaml")
        assert load_recipe(tmp_path / "resolved.yaml") == recipe
        return recipe

    return load


@pytest.fixture
def problems(load):
    def problems(reward: object, *overrides: str, judge: object = None) -> dict[str, str]:
        """Kind by key of what is wrong."""
        with pytest.raises(RecipeError) as caught:
            load(reward, *overrides, judge=judge)
        return {key: kind for key, kind, _ in caught.value.problems}

    return problems


def test_a_reward_without_a_type_is_a_clip_score(load):
    recipe = load({"path": "a/b", "batch_size": 3}, judge={"path": "c"})
    assert recipe.reward == ClipScoreSpec(path="a/b", batch_size=3)
    assert recipe.compare.judge == ClipScoreSpec(path="c")


def test_what_decides_the_scores_is_the_identity_and_old_ones_stay(load):
    """Sets made before there were other types have the hash of type and path alone."""
    plain = load({"path": "a"}).reward
    assert plain.identity() == {"type": "clip_score", "path": "a"}
    assert plain.settings() == ""
    assert load({"path": "a", "batch_size": 1}).reward.identity() == plain.identity()
    half = load({"path": "a", "precision": "bf16"}).reward
    assert half.identity() == plain.identity() | {"precision": "bf16"}
    moved = load({"path": "b", "precision": "bf16", "revision": "main"}).reward
    assert half.settings() == moved.settings() != ""


@pytest.mark.parametrize(
    ("reward", "label"),
    [
        ({"path": "a"}, "clip_score a"),
        ({"type": "pick_score", "path": "a", "processor": "b"}, "pick_score a"),
        ({"type": "hps", "path": "a.pt"}, "hps a.pt"),
        ({"type": "aesthetic", "head": "h.pth"}, "aesthetic openai/clip-vit-large-patch14"),
        ({"type": "image_reward", "path": "a.pt"}, "image_reward a.pt"),
        (
            {"type": "caption_similarity", "path": "a", "sentence_model": "b"},
            "caption_similarity a",
        ),
        ({"type": "jpeg_compressibility"}, "jpeg_compressibility"),
        ({"type": "jpeg_incompressibility"}, "jpeg_incompressibility"),
        ({"type": "colorfulness"}, "colorfulness"),
        ({"type": "python", "function": "a.b:c"}, "python a.b:c"),
        (
            {"type": "vote", "rewards": [{"reward": {"path": "a"}}, {"reward": {"path": "b"}}]},
            "vote 1 x (clip_score a) + 1 x (clip_score b)",
        ),
    ],
)
def test_every_type_has_a_label(load, reward, label):
    assert load(reward, judge=reward).reward.label == label


def test_keys_inside_a_list_keep_their_places_in_messages(problems):
    rewards = [
        {"reward": {"pth": "x", "path": "y"}, "weight": "a"},
        {"reward": {"type": "vote"}},
        {"reward": {"type": "colorfulness", "path": "x"}, "weights": 3},
        {"weight": 1.0},
    ]
    found = problems({"type": "weighted", "rewards": rewards})
    assert {key.removeprefix("reward.rewards"): kind for key, kind in found.items()} == {
        "[0].reward.pth": "unknown",
        "[0].weight": "wrong-type",
        "[1].reward.type": "unknown",
        "[2].reward.path": "contradiction",
        "[2].weights": "unknown",
        "[3].reward": "missing",
    }


@pytest.mark.parametrize(
    ("reward", "key", "kind"),
    [
        ({"type": "beauty"}, "reward.type", "unknown"),
        ({}, "reward.path", "missing"),
        ({"type": "hps"}, "reward.path", "missing"),
        ({"type": "hps", "path": "a", "revision": "b"}, "reward.revision", "contradiction"),
        ("clip_score", "reward", "wrong-type"),
        ({"type": "weighted", "rewards": []}, "reward", "contradiction"),
        (
            {"type": "vote", "rewards": [{"reward": {"path": "a"}, "weight": 0}]},
            "reward",
            "contradiction",
        ),
        ({"path": "a", "precision": "fp8"}, "reward.precision", "unknown"),
        *(
            ({"type": "python", "function": text}, "reward.function", "contradiction")
            for text in ("os.system", "import os", "a:b:c", "a.:b", "os:system('ls')", ":f")
        ),
    ],
)
def test_what_is_wrong_is_told_by_its_key(problems, reward, key, kind):
    assert problems(reward) == {key: kind}


def test_a_judge_is_told_what_is_wrong_as_a_reward_is(problems):
    assert problems({"path": "a"}, judge={"type": "python", "path": "x"}) == {
        "compare.judge.function": "missing",
        "compare.judge.path": "contradiction",
    }


def test_overrides_choose_and_change_a_reward_but_not_what_is_in_a_list(load, problems):
    recipe = load({"path": "a"}, "compare.judge.type=colorfulness", "reward.precision=bf16")
    assert recipe.compare.judge is not None and recipe.compare.judge.type == "colorfulness"
    assert recipe.reward.precision == "bf16"
    inside = "reward.rewards[].weight"
    assert problems({"path": "a"}, f"{inside}=3") == {inside: "unsupported"}


def test_help_shows_the_keys_of_every_type_and_none_twice():
    shown = for_terminal()
    for key in ("reward.sentence_model", "reward.rewards", "compare.judge.function"):
        assert f"\n  {key} = " in shown
    assert "[]." not in shown


@pytest.mark.parametrize("kind", ["weighted", "vote"])
def test_scores_relative_to_a_prompt_are_not_for_data_read_in_batches(load, problems, kind):
    reward = {"type": kind, "rewards": [{"reward": {"path": "a"}}]}
    pairs = ["prepare.source.type=paired", "prepare.source.path=p"]
    pairs += ["curriculum.difficulty=score_gap"]
    assert list(problems(reward, *pairs).values()) == ["contradiction"]
    load(reward, *pairs, "prepare.source.scores=[a, b]")
    ranked = ["prepare.source.type=ranked", "prepare.source.path=p"]
    load(reward, *ranked)
    told = problems(reward, *ranked, "prepare.source.score=null")
    assert list(told.values()) == ["contradiction"]


def test_parts_of_a_sum_are_part_of_its_identity():
    def of(*weights: float) -> WeightedSpec:
        parts = [{"reward": {"path": "a"}, "weight": weight} for weight in weights]
        return WeightedSpec.model_validate({"rewards": parts})

    assert of(1, 2).identity() == of(1, 2).identity() != of(2, 1).identity()
    assert of(1.0).identity()["rewards"] == [{"type": "clip_score", "path": "a", "weight": 1.0}]


def test_the_examples_of_the_documentation_are_valid_and_name_every_key(load):
    text = (Path(__file__).parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    examples = [yaml.safe_load(part) for part in re.findall(r"```yaml\n(.*?)```", text, re.S)]
    rewards = [load(example["reward"]).reward for example in examples if "reward" in example]
    assert len({reward.type for reward in rewards}) >= 12
    for reward in rewards:
        for key in type(reward).model_fields:
            assert f"`{key}`" in text
