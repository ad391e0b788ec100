"""Rewards in recipes: a `type` chooses, keys of other types are refused, old recipes stay valid."""

import re
from pathlib import Path

import pytest
import yaml
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.recipe.reference import for_terminal
from cdpo.engine.recipe.reward import ClipScoreSpec, WeightedSpec
from refusals import refused


def test_a_reward_without_a_type_is_a_clip_score(load):
    recipe = load(reward={"path": "a/b", "batch_size": 3}, compare={"judge": {"path": "c"}})
    assert recipe.reward == ClipScoreSpec(path="a/b", batch_size=3)
    assert recipe.compare.judge == ClipScoreSpec(path="c")


def test_what_decides_the_scores_is_the_identity_and_old_ones_stay(load):
    """Sets made before there were other types have the hash of type and path alone."""
    plain = load(reward={"path": "a"}).reward
    assert plain.identity() == {"type": "clip_score", "path": "a"}
    assert plain.settings() == ""
    assert load(reward={"path": "a", "batch_size": 1}).reward.identity() == plain.identity()
    half = load(reward={"path": "a", "precision": "bf16"}).reward
    assert half.identity() == plain.identity() | {"precision": "bf16"}
    moved = load(reward={"path": "b", "precision": "bf16", "revision": "main"}).reward
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
    assert load(reward=reward, compare={"judge": reward}).reward.label == label


def test_keys_inside_a_list_keep_their_places_in_messages(problems):
    rewards = [
        {"reward": {"pth": "x", "path": "y"}, "weight": "a"},
        {"reward": {"type": "vote"}},
        {"reward": {"type": "colorfulness", "path": "x"}, "weights": 3},
        {"weight": 1.0},
    ]
    found = problems(reward={"type": "weighted", "rewards": rewards})
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
    assert problems(reward=reward) == {key: kind}


def test_a_judge_is_told_what_is_wrong_as_a_reward_is(problems):
    assert problems(compare={"judge": {"type": "python", "path": "x"}}) == {
        "compare.judge.function": "missing",
        "compare.judge.path": "contradiction",
    }


def test_overrides_choose_and_change_a_reward_but_not_what_is_in_a_list(load, problems):
    recipe = load("compare.judge.type=colorfulness", "reward.precision=bf16")
    assert recipe.compare.judge is not None and recipe.compare.judge.type == "colorfulness"
    assert recipe.reward.precision == "bf16"
    inside = "reward.rewards[].weight"
    assert problems(f"{inside}=3") == {inside: "unsupported"}


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
    wording = "relative-reward" if kind == "vote" else None
    with refused(RecipeError, "contradiction", wording=wording):
        load(*pairs, reward=reward)
    load(*pairs, "prepare.source.scores=[a, b]", reward=reward)
    ranked = ["prepare.source.type=ranked", "prepare.source.path=p"]
    load(*ranked, reward=reward)
    told = problems(*ranked, "prepare.source.score=null", reward=reward)
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
    rewards = [load(reward=example["reward"]).reward for example in examples if "reward" in example]
    assert len({reward.type for reward in rewards}) >= 12
    for reward in rewards:
        for key in type(reward).model_fields:
            assert f"`{key}`" in text
