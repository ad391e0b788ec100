"""Pairs and tiers of imported data, against the definitions."""

import numpy as np
import pytest
from cdpo.engine.basics.errors import DataError
from cdpo.engine.basics.keyed import content_id
from cdpo.engine.curriculum import labelled
from cdpo.engine.curriculum.labelled import (
    ALL_TIE,
    DISAGREE,
    KEPT,
    ONE_IMAGE,
    SWAPPED,
    TOO_CLOSE,
    UNSCORED,
    PairsMade,
    labelled_pairs,
    ranked_pairs,
)
from cdpo.engine.curriculum.pairs import form_pairs
from cdpo.engine.recipe import Curriculum
from refusals import refused

NAN = float("nan")
#                 agree     against   tie       agree     none      agree
SCORES = np.array([[5, 1], [2, 3], [1, 1], [0, 2], [NAN, 1], [1.25, 1]], np.float32)
WINNERS = np.array([0, 0, 0, 1, 0, 0])
IDS = np.arange(100, 106)


def label(on_disagreement: str = "drop", **curriculum: object) -> PairsMade:
    spec = Curriculum(difficulty="score_gap", **{"tiers": 2, **curriculum})
    return labelled_pairs(IDS, WINNERS, SCORES, on_disagreement, spec)


def test_a_pair_is_the_labels_winner_against_the_other():
    made = label()
    assert made.pairs["id"].tolist() == [100, 103, 105]
    assert made.pairs["winner"].tolist() == [0, 7, 10]
    assert made.pairs["loser"].tolist() == [1, 6, 11]
    assert made.pairs["scores"].tolist() == [[5, 1], [2, 0], [1.25, 1]]
    assert made.pairs["ranks"].tolist() == [[1, 2]] * 3
    assert made.counts == {UNSCORED: 1, TOO_CLOSE: 1, DISAGREE: 1} and not made.remarks
    assert [made.lost[why].tolist() for why in (UNSCORED, TOO_CLOSE, DISAGREE)] == [[4], [2], [1]]


def test_disagreement_may_be_kept_or_overruled():
    kept = label("keep")
    assert kept.pairs["id"].tolist() == [100, 101, 103, 105]
    assert kept.pairs[1]["winner"] == 2 and kept.pairs[1]["scores"].tolist() == [2, 3]
    assert kept.counts == {UNSCORED: 1, TOO_CLOSE: 1, KEPT: 1}
    assert kept.remarks[KEPT].tolist() == [1]
    swapped = label("swap")
    assert swapped.pairs["id"].tolist() == [100, 101, 103, 105]
    assert swapped.pairs[1]["winner"] == 3 and swapped.pairs[1]["scores"].tolist() == [3, 2]
    assert swapped.counts == {UNSCORED: 1, TOO_CLOSE: 1, SWAPPED: 1}


@pytest.mark.parametrize(
    ("mode", "binning", "expected"),
    [
        # Gaps 4, 2, 0.25 of the width 4: two tiers part at 2, which is in the harder one.
        ("drop", "equal_width", {100: 1, 103: 2, 105: 2}),
        ("drop", "quantile", {100: 1, 103: 1, 105: 2}),
        # Gaps 4, 1, 2, 0.25.
        ("swap", "quantile", {100: 1, 101: 2, 103: 1, 105: 2}),
        # Gaps 4, -1, 2, 0.25 over the width 5 from -1: they part at 1.5.
        ("keep", "equal_width", {100: 1, 101: 2, 103: 1, 105: 2}),
        ("keep", "quantile", {100: 1, 101: 2, 103: 1, 105: 2}),
    ],
)
def test_tiers_are_cut_over_the_whole_set(mode, binning, expected):
    pairs = label(mode, binning=binning).pairs
    assert dict(zip(pairs["id"].tolist(), pairs["tier"].tolist(), strict=True)) == expected


def test_a_label_kept_against_the_scores_is_the_hardest():
    pairs = label("keep", binning="quantile", tiers=4).pairs
    assert pairs["tier"][pairs["id"] == 101].tolist() == [4]


def test_the_least_gap_holds_on_both_sides():
    made = label("swap", min_score_gap=1.5)
    assert made.pairs["id"].tolist() == [100, 103] and made.counts[TOO_CLOSE] == 3


def test_quantiles_of_many_are_equal_and_in_order():
    count = 1003
    scores = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    winners = (scores[:, 1] > scores[:, 0]).astype(int)
    spec = Curriculum(difficulty="score_gap", binning="quantile", tiers=5)
    pairs = labelled_pairs(np.arange(count), winners, scores, "drop", spec).pairs
    gaps = pairs["scores"][:, 0] - pairs["scores"][:, 1]
    sizes = np.bincount(pairs["tier"])[1:]
    assert len(pairs) == count and sizes.max() - sizes.min() <= 1
    for tier in range(1, 5):
        assert gaps[pairs["tier"] == tier].min() >= gaps[pairs["tier"] == tier + 1].max()


def test_nothing_left_is_no_pairs():
    scores = np.full((3, 2), np.nan, np.float32)
    spec = Curriculum(difficulty="score_gap", binning="quantile")
    made = labelled_pairs(np.arange(3), np.zeros(3, int), scores, "keep", spec)
    assert len(made.pairs) == 0 and made.counts == {UNSCORED: 3}


def test_images_of_a_caption_are_ranked_as_sampled_candidates_are():
    """Against form_pairs, with captions mixed."""
    captions = ["cat", "dog", "cat", "cat", "owl", "dog", "cat", "dog", "cat", "dog"]
    scores = np.array([3, 1, 4, 1, 5, 9, 2, 6, NAN, 5], np.float32)
    curriculum = Curriculum(tiers=3, pairs_per_prompt_per_tier=2)
    ids = np.array([content_id(caption) for caption in captions])
    made = ranked_pairs(ids, scores, captions.__getitem__, curriculum, seed=5)
    expected = set()
    for caption in ("cat", "dog"):
        members = [row for row, name in enumerate(captions) if name == caption]
        for pair in form_pairs(caption, scores[members], curriculum, 5).pairs:
            images = members[pair["winner"]], members[pair["loser"]]
            expected.add((int(pair["id"]), int(pair["tier"]), *images, *pair["ranks"].tolist()))
    found = {
        (int(p["id"]), int(p["tier"]), int(p["winner"]), int(p["loser"]), *p["ranks"].tolist())
        for p in made.pairs
    }
    assert found == expected and len(made.pairs) == len(expected)
    assert made.counts == {UNSCORED: 1, ONE_IMAGE: 1} and made.eligible == 12
    assert made.lost[ONE_IMAGE].tolist() == [4] and made.lost[UNSCORED].tolist() == [8]


def test_images_of_a_caption_that_all_tie_are_each_counted():
    ids, scores = np.array([1, 2, 1, 2, 1]), np.array([5, 1, 5, 2, 5], np.float32)
    made = ranked_pairs(ids, scores, str, Curriculum(tiers=1), seed=0)
    assert made.counts == {ALL_TIE: 3} and made.tied == [0] and len(made.pairs) == 1
    assert made.lost[ALL_TIE].tolist() == [0, 2, 4]


def test_a_caption_of_too_many_images_is_likely_the_wrong_column():
    ids = np.zeros(labelled.MAX_OF_CAPTION + 1, np.int64)
    with refused(DataError, "too-large", "prepare.source.caption"):
        ranked_pairs(ids, np.zeros(len(ids), np.float32), lambda _: "jpg", Curriculum(), 0)
