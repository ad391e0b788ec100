"""Weighted sums and votes against their definitions, prompt by prompt."""

import numpy as np
import pytest
import torch
from cdpo.engine.recipe.reward import (
    ClipScoreSpec,
    ColorfulnessSpec,
    JpegSpec,
    Part,
    VoteSpec,
    WeightedSpec,
)
from cdpo.engine.rewards import is_relative, load_reward, score_together
from cdpo.engine.rewards.combined import Vote, Weighted, borda_shares, standardised
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reward_files import pictures

CPU = torch.device("cpu")
SCORES = hnp.arrays(
    np.float32, st.integers(1, 9), elements=st.sampled_from([-2.0, 0.1, 0.5, 7.0, 1e4])
)


class Given:
    """Scores that are told, whatever the images."""

    def __init__(self, scores):
        self.scores = np.asarray(scores, np.float32)
        self.identity = {"weights": str(scores), "whole": str(scores)}

    def score(self, images, prompts):
        return self.scores[: len(images)]


@given(SCORES)
def test_borda_shares_by_counting(scores):
    others = len(scores) - 1
    for share, own in zip(borda_shares(scores), scores, strict=True):
        below = sum(other < own for other in scores)
        ties = sum(other == own for other in scores) - 1
        assert share == pytest.approx((below + ties / 2) / others if others else 0.5)


@given(SCORES)
def test_standardised_scores_have_mean_0_and_deviation_1(scores):
    values = standardised(scores)
    assert values.mean() == pytest.approx(0, abs=1e-9)
    assert values.std() == pytest.approx(float(len(set(scores.tolist())) > 1))
    assert (np.argsort(values, kind="stable") == np.argsort(scores, kind="stable")).all()


def test_weighted_by_hand():
    """Prompt a: (0, 2) and (30, 10) both become -1, 1 or 1, -1. Prompt b ties in the first."""
    reward = Weighted([Given([0, 5, 2, 5]), Given([30, 1, 10, 3])], [2.0, -0.5])
    found = reward.score(pictures(4), ["a", "b", "a", "b"])
    assert found.dtype == np.float32
    assert found.tolist() == [-2.5, 0.5, 2.5, -0.5]


def test_vote_by_hand():
    """Shares 0, 1/2, 1 of the one and 3/4, 0, 3/4 of the other, weighted 1 and 3."""
    reward = Vote([Given([1, 2, 3]), Given([9, 8, 9])], [1.0, 3.0])
    found = reward.score(pictures(3), ["a"] * 3)
    assert found.tolist() == pytest.approx([9 / 16, 2 / 16, 13 / 16])
    against = Vote([Given([1, 2, 3]), Given([9, 8, 9])], [1.0, -1.0])
    assert against.score(pictures(3), ["a"] * 3).tolist() == pytest.approx([-3 / 8, 1 / 4, 1 / 8])


@pytest.mark.parametrize("kind", [Weighted, Vote])
def test_an_image_that_one_part_could_not_score_has_no_score(kind):
    """And the others are compared as if it were not there."""
    with_gap = kind([Given([1, np.nan, 3, 8]), Given([5, 6, np.inf, 7])], [1.0, 1.0])
    found = with_gap.score(pictures(4), ["a"] * 4)
    without = kind([Given([1, 8]), Given([5, 7])], [1.0, 1.0]).score(pictures(2), ["a"] * 2)
    assert np.isnan(found).tolist() == [False, True, True, False]
    assert found[[0, 3]].tolist() == without.tolist()
    assert kind([Given([np.nan])], [1.0]).score(pictures(1), ["a"]).tolist() != [0.0]


def test_scores_are_of_one_prompt_whatever_comes_with_it(tiny_world):
    parts = (
        Part(reward=ClipScoreSpec(path=str(tiny_world / "reward")), weight=2.0),
        Part(reward=ColorfulnessSpec()),
        Part(reward=JpegSpec(), weight=-0.5),
    )
    images, prompts = pictures(6), ["house", "tree", "house", "tree", "house", "tree"]
    for spec in (WeightedSpec(rewards=parts), VoteSpec(rewards=parts)):
        reward = load_reward(spec, CPU)
        mixed = reward.score(images, prompts)
        for prompt in ("house", "tree"):
            own = [place for place, other in enumerate(prompts) if other == prompt]
            alone = load_reward(spec, CPU).score([images[p] for p in own], [prompt] * 3)
            np.testing.assert_allclose(mixed[own], alone, rtol=0, atol=1e-5)  # batches differ


def test_sets_scored_together_can_be_compared():
    """Alone, a set of a relative reward has mean 0; together, the better set is above."""
    spec = WeightedSpec(rewards=(Part(reward=ColorfulnessSpec()),))
    assert is_relative(spec) and not is_relative(ColorfulnessSpec())
    reward = load_reward(spec, CPU)
    gray = [image.convert("L").convert("RGB") for image in pictures(2, seed=1)]
    base, tuned, one = score_together(reward, [gray, pictures(3), pictures(1, seed=2)], "a dog")
    assert (len(base), len(tuned), len(one)) == (2, 3, 1)
    assert base.max() < tuned.min()
    assert np.concatenate([base, tuned, one]).mean() == pytest.approx(0, abs=1e-6)


def test_fingerprints_tell_kinds_parts_and_weights_apart():
    parts = [Given([1.0]), Given([2.0])]
    made = [Weighted(parts, [1, 1]), Vote(parts, [1, 1]), Weighted(parts, [1, 2])]
    made.append(Weighted(parts[::-1], [1, 1]))
    assert len({reward.fingerprint for reward in made}) == 4
