"""Rewards of all kinds through stage 1: what they rank, and what becomes of their failures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import reward_files as files
import tiny
import torch
import webdataset
import yaml
from cdpo.engine.basics.errors import DataError
from cdpo.engine.comparing.scores import SideScoring
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.preparing.candidates import CandidateSet
from cdpo.engine.preparing.preparation import Preparation
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.reading import load_recipe
from cdpo.engine.recipe.reward import PythonSpec
from cdpo.engine.rewards import load_reward
from cdpo.engine.rewards.pixels import colorfulness
from cdpo.engine.shards.manifest import RewardSource, load_manifest
from PIL import Image
from refusals import refused

Prepare = Callable[..., tuple[Recipe, RewardSource]]


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


def scored(recipe: Recipe) -> dict[str, np.ndarray]:
    """Scores by prompt, as stage 1 wrote them."""
    found: dict[str, list[float]] = {}
    for row in pq.read_table(Path(recipe.run_dir) / "scores.parquet").to_pylist():
        found.setdefault(row["prompt"], []).append(row["score"])
    return {prompt: np.asarray(values) for prompt, values in found.items()}


def candidates_of(recipe: Recipe) -> dict[str, list[Image.Image]]:
    """The images that were ranked, by prompt, through webdataset's own reader."""
    found: dict[str, list[Image.Image]] = {}
    for path in sorted((Path(recipe.run_dir) / "candidates").glob("*.tar")):
        for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode("pil"):
            found.setdefault(sample["json"]["prompt"], []).append(sample["png"])
    return found


def test_captions_rank_candidates(prepare, tmp_path):
    """A tiny vision-language model and a tiny sentence model, end to end."""
    reward = {
        "type": "caption_similarity",
        "path": str(files.save_captioner(tmp_path / "captioner")),
        "sentence_model": str(files.save_sentence_model(tmp_path / "sentences")),
        "max_new_tokens": 4,
    }
    recipe, source = prepare(reward)
    assert (source.type, source.path) == ("caption_similarity", reward["path"])
    again = load_reward(recipe.reward, torch.device("cpu"))
    assert again.fingerprint == source.fingerprint
    found, images = scored(recipe), candidates_of(recipe)
    assert list(found) == tiny.PROMPTS
    for prompt in tiny.PROMPTS[:2]:
        own = images[prompt]
        np.testing.assert_allclose(again.score(own, [prompt] * len(own)), found[prompt], atol=1e-6)


def test_rewards_without_weights_rank_and_have_a_name_in_the_manifest(prepare):
    recipe, source = prepare({"type": "colorfulness"})
    assert (source.type, source.path) == ("colorfulness", "")
    images = candidates_of(recipe)
    for prompt, scores in scored(recipe).items():
        expected = [colorfulness(image) for image in images[prompt]]
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_a_weighted_sum_compares_the_candidates_of_a_prompt(prepare, tiny_world):
    parts = [
        {"reward": {"path": str(tiny_world / "reward")}, "weight": 2.0},
        {"reward": {"type": "jpeg_compressibility"}},
    ]
    recipe, source = prepare({"type": "weighted", "rewards": parts})
    assert source.path == f"2 x (clip_score {tiny_world / 'reward'}) + 1 x (jpeg_compressibility)"
    for scores in scored(recipe).values():
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
    bad = {prompt: np.flatnonzero(np.isnan(values)) for prompt, values in scored(recipe).items()}
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
    prepare({"type": "colorfulness"})
    prepare({"type": "jpeg_compressibility"})
    monkeypatch.setattr(
        "cdpo.engine.rewards.pixels.colorfulness", lambda _: pytest.fail("scored again")
    )
    prepare({"type": "colorfulness"})


def test_a_reward_that_scores_none_of_the_images_ends_a_comparison(
    function, tmp_path, ranks, capsys
):
    sides = {}
    for number, name in enumerate(("base", "tuned")):
        sides[name] = CandidateSet(tmp_path / name, {"count": 2, "of": name})
        sides[name].write("house", files.pictures(2, seed=number))
    spec = PythonSpec.model_validate(function("def score(images, prompts):\n    return 1 / 0\n"))
    scoring = SideScoring(tmp_path / "scores", ranks, sides, ["house"])
    with refused(DataError, "non-finite", "python"):
        scoring.scores(spec, load_reward(spec, ranks.device))
    said = capsys.readouterr().err
    assert said.count("which is left out") == 4
    assert not list((tmp_path / "scores").rglob("*.safetensors")), "kept, and so never tried again"


def test_votes_compare_base_and_tuned_images_of_a_prompt(world, tmp_path):
    """Scored apart, each side of a relative reward would have the same mean: 1/2."""
    run = tmp_path / "run"
    world.train(run, "train.optimizer.lr=0.02").succeeded()
    values = yaml.safe_load(world.recipe.read_text())
    parts = [{"reward": {"type": "colorfulness"}}, {"reward": values["reward"]}]
    values["reward"] = {"type": "vote", "rewards": parts}
    values["compare"]["judge"] = {"type": "colorfulness"}
    recipe = tiny.write_recipe(tmp_path / "vote.yaml", values)
    overrides = [f"run_dir={run}", "compare.divergence_draws=0"]
    outcome = world.server.run("compare", recipe, overrides).succeeded()
    assert "vote 1 x (colorfulness) + 1 x (clip_score" in " ".join(outcome.text.split())
    results = json.loads((run / "compare" / "results.json").read_text())
    by_name = {
        scorer["scorer"]: scorer for part in results["prompt_sets"] for scorer in part["scorers"]
    }
    votes = by_name["reward"]
    both = np.concatenate([votes["base_scores"], votes["tuned_scores"]], axis=1)
    np.testing.assert_allclose(both.mean(1), 0.5, atol=1e-6)  # of all images of a prompt
    assert np.abs(np.mean(votes["base_scores"], axis=1) - 0.5).max() > 0.05
