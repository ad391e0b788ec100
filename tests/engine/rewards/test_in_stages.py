"""Rewards of all kinds through stage 1: what they rank, and what becomes of their failures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reward_files as files
import tiny
import torch
import yaml
from cdpo.engine.basics.errors import DataError
from cdpo.engine.comparing.scores import SideScoring
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.preparing.preparation import Preparation
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.recipe.reward import ColorfulnessSpec, JpegSpec, Part, PythonSpec, VoteSpec
from cdpo.engine.rewards import load_reward
from cdpo.engine.rewards.pixels import colorfulness
from cdpo.engine.shards.manifest import RewardSource, load_manifest
from prepared import candidates_of, scores_of
from refusals import refused

Prepare = Callable[..., tuple[Recipe, RewardSource]]
SIDES = ("base", "tuned")


@pytest.fixture
def prepare(tiny_world: Path, tmp_path: Path, ranks: Ranks) -> Prepare:
    """Runs stage 1 of the tiny recipe with another reward; returns what the manifest says."""

    def run(reward: dict[str, object], *overrides: str) -> tuple[Recipe, RewardSource]:
        values = yaml.safe_load((tiny_world / "recipe.yaml").read_text()) | {"reward": reward}
        path = tiny.write_recipe(tmp_path / "recipe.yaml", values)
        recipe = load_recipe(path, [f"run_dir={tmp_path / 'run'}", *overrides])
        preparation = Preparation(ranks, recipe, Terminal())
        preparation.run()
        assert Preparation(ranks, recipe, Terminal()).is_finished
        return recipe, load_manifest(recipe.shards_dir).reward

    return run


def test_captions_rank_candidates(prepare, tmp_path):
    """A tiny vision-language model and a tiny sentence model, end to end."""
    reward = {
        "type": "caption_similarity",
        "path": str(files.save_captioner(tmp_path / "captioner")),
        "sentence_model": str(files.save_sentence_model(tmp_path / "sentences")),
        "max_new_tokens": 4,
    }
    recipe, source = prepare(reward, "prompts.limit=2")
    assert (source.type, source.path) == ("caption_similarity", reward["path"])
    again = load_reward(recipe.reward, torch.device("cpu"))
    assert again.identity["weights"] == source.fingerprint
    found, images = scores_of(recipe.run_dir), candidates_of(recipe.run_dir)
    assert list(found) == tiny.PROMPTS[:2]
    for prompt in found:
        own = images[prompt]
        np.testing.assert_allclose(again.score(own, [prompt] * len(own)), found[prompt], atol=1e-6)


def test_rewards_without_weights_rank_and_have_a_name_in_the_manifest(prepare):
    recipe, source = prepare({"type": "colorfulness"})
    assert (source.type, source.path) == ("colorfulness", "")
    images = candidates_of(recipe.run_dir)
    for prompt, scores in scores_of(recipe.run_dir).items():
        expected = [colorfulness(image) for image in images[prompt]]
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_weighted_sum_compares_the_candidates_of_a_prompt(prepare, tiny_world):
    parts = [
        {"reward": {"path": str(tiny_world / "reward")}, "weight": 2.0},
        {"reward": {"type": "jpeg_compressibility"}},
    ]
    recipe, source = prepare({"type": "weighted", "rewards": parts})
    assert source.path == f"2 x (clip_score {tiny_world / 'reward'}) + 1 x (jpeg_compressibility)"
    for scores in scores_of(recipe.run_dir).values():
        assert scores.mean() == pytest.approx(0, abs=1e-5)
        assert 1 <= scores.std() <= 3  # weights 2 and 1 of standardised scores


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, str]]:
    """Writes a module with a function `score` of the user's; returns the section that names it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(body: str) -> dict[str, str]:
        name = f"reward_{abs(hash(body)):x}"
        (tmp_path / f"{name}.py").write_text(body)
        return {"type": "python", "function": f"{name}:score"}

    return write


PICKY = """
shown = []

def score(images, prompts):
    numbers = []
    for image, prompt in zip(images, prompts):
        shown.append(prompt)
        if prompt == "house" and shown.count("house") in (2, 4):
            raise ValueError("cannot look at this")
        numbers.append(float(sum(image.getpixel((3, 3)))))
    return numbers
"""


def test_an_image_on_which_the_users_function_raises_is_named_and_dropped(
    prepare, function, capsys
):
    """It raises on the second candidate in the batch of six, then on that one alone."""
    recipe, _ = prepare(function(PICKY))
    said = " ".join(capsys.readouterr().err.split())
    assert "no score for candidate 1 of 'house', which is left out: ValueError: cannot look" in said
    assert "1 candidates had no finite reward and were dropped" in said
    bad = {
        prompt: np.flatnonzero(np.isnan(values))
        for prompt, values in scores_of(recipe.run_dir).items()
    }
    assert {prompt: places.tolist() for prompt, places in bad.items() if len(places)} == {
        "house": [1]
    }


@pytest.mark.parametrize("answer", ["[float('nan')] * len(images)", "[1.0] * len(images)", "1 / 0"])
def test_a_function_that_ranks_nothing_is_an_error(prepare, function, answer, capsys):
    """42 images are few: more than 64 that raise end the run at once (test_scored_call)."""
    reward = function(f"def score(images, prompts):\n    return {answer}\n")
    with refused(DataError, "empty", "curriculum.min_score_gap"):
        prepare(reward)
    if answer == "1 / 0":
        assert "ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_scores_are_kept_when_another_reward_came_between(prepare, tmp_path, monkeypatch):
    """The cache is by image: going back to the first reward scores nothing anew."""
    prepare({"type": "colorfulness"}, "prompts.limit=2")
    prepare({"type": "jpeg_compressibility"}, "prompts.limit=2")
    monkeypatch.setattr(
        "cdpo.engine.rewards.pixels.colorfulness", lambda _: pytest.fail("scored again")
    )
    prepare({"type": "colorfulness"}, "prompts.limit=2")


@pytest.fixture
def sides(tmp_path: Path) -> dict[str, CandidateSet]:
    """Two images of a prompt from each of two models, of which base draws in gray."""
    found = {name: CandidateSet(tmp_path / name, {"count": 2, "of": name}) for name in SIDES}
    gray = [image.convert("L").convert("RGB") for image in files.pictures(2)]
    for name, images in zip(SIDES, (gray, files.pictures(2, seed=1)), strict=True):
        found[name].write("house", images)
    return found


def test_a_reward_that_scores_none_of_the_images_ends_a_comparison(
    function, sides, tmp_path, ranks, capsys
):
    spec = PythonSpec.model_validate(function("def score(images, prompts):\n    return 1 / 0\n"))
    scoring = SideScoring(tmp_path / "scores", ranks, sides, ["house"])
    with refused(DataError, "non-finite", "python"):
        scoring.scores(spec, load_reward(spec, ranks.device))
    said = capsys.readouterr().err
    assert said.count("which is left out") == 4
    assert not list((tmp_path / "scores").rglob("*.safetensors")), "kept, and so never tried again"


def test_votes_compare_base_and_tuned_images_of_a_prompt(sides, tmp_path, ranks):
    """Scored apart, each side of a relative reward would have the same mean: 1/2."""
    parts = (Part(reward=ColorfulnessSpec()), Part(reward=JpegSpec(), weight=2.0))
    spec = VoteSpec(rewards=parts)
    scoring = SideScoring(tmp_path / "scores", ranks, sides, ["house"])
    votes = scoring.scores(spec, load_reward(spec, ranks.device))
    both = np.concatenate([votes["base"], votes["tuned"]], axis=1)
    np.testing.assert_allclose(both.mean(1), 0.5, atol=1e-6)  # of all images of a prompt
    assert abs(votes["base"].mean() - 0.5) > 0.05
