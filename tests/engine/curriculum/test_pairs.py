import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch
from cdpo.engine.basics.keyed import content_id
from cdpo.engine.curriculum.pairs import form_pairs
from cdpo.engine.ranks import Ranks
from cdpo.engine.recipe import Curriculum
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


class Pair(NamedTuple):
    pair_id: int
    tier: int
    winner: int
    loser: int
    winner_rank: int
    loser_rank: int
    winner_score: float
    loser_score: float


def named(pairs: np.ndarray) -> list[Pair]:
    return [Pair(*row[:4], *row[4], *row[5]) for row in pairs.tolist()]


def pairs_of(prompt: str, scores: np.ndarray, curriculum: Curriculum, seed: int) -> list[Pair]:
    return named(form_pairs(prompt, scores, curriculum, seed).pairs)


SCORES = hnp.arrays(
    np.float32,
    st.integers(0, 14),
    elements=st.one_of(
        st.floats(-4, 4, width=16), st.sampled_from([0.5, -0.5, np.nan, np.inf, -np.inf])
    ),
)
CURRICULA = st.builds(
    Curriculum,
    tiers=st.integers(1, 6),
    difficulty=st.sampled_from(["rank_gap", "score_gap"]),
    binning=st.sampled_from(["equal_width", "quantile"]),
    min_score_gap=st.sampled_from([0.0, 0.0, 0.5]),
    pairs_per_prompt_per_tier=st.sampled_from([1, 3, 1000]),
)


@settings(deadline=None)
@given(SCORES, CURRICULA)
def test_the_tiers_partition_the_eligible_pairs(scores, curriculum):
    unlimited = curriculum.model_copy(update={"pairs_per_prompt_per_tier": 10**6})
    formed = form_pairs("a dog", scores, unlimited, seed=0)
    eligible = {
        (winner, loser)
        for winner in range(len(scores))
        for loser in range(len(scores))
        if np.isfinite(scores[winner])
        and np.isfinite(scores[loser])
        and scores[winner] > scores[loser]
        and float(scores[winner]) - float(scores[loser]) >= curriculum.min_score_gap
    }
    found = [(pair.winner, pair.loser) for pair in named(formed.pairs)]
    assert len(found) == len(set(found)) == formed.num_eligible
    assert set(found) == eligible
    assert all(1 <= pair.tier <= curriculum.tiers for pair in named(formed.pairs))
    assert formed.dropped_candidates == np.count_nonzero(~np.isfinite(scores))


@settings(deadline=None)
@given(SCORES, CURRICULA, st.integers(0, 2**32 - 1))
def test_winner_above_loser_within_the_budget_and_sorted(scores, curriculum, seed):
    pairs = pairs_of("a cat", scores, curriculum, seed)
    for pair in pairs:
        assert pair.winner_score > pair.loser_score
        assert pair.winner_rank < pair.loser_rank
        assert (pair.winner_score, pair.loser_score) == (scores[pair.winner], scores[pair.loser])
        assert pair.pair_id == content_id("a cat", str(pair.winner), str(pair.loser))
    counts = Counter(pair.tier for pair in pairs)
    assert max(counts.values(), default=0) <= curriculum.pairs_per_prompt_per_tier
    order = [(pair.tier, pair.winner_rank, pair.loser_rank) for pair in pairs]
    assert order == sorted(order)


@settings(deadline=None)
@given(SCORES, CURRICULA)
def test_a_larger_budget_keeps_what_a_smaller_one_kept(scores, curriculum):
    def kept(budget):
        sized = curriculum.model_copy(update={"pairs_per_prompt_per_tier": budget})
        return {pair.pair_id for pair in pairs_of("a cat", scores, sized, 3)}

    assert kept(1) <= kept(2) <= kept(5)


@settings(deadline=None)
@given(SCORES, CURRICULA, st.data())
def test_by_rank_only_the_order_of_scores_counts(scores, curriculum, data):
    """Any strictly increasing change of the values, drawn value by value, forms the same pairs."""
    by_rank = curriculum.model_copy(update={"difficulty": "rank_gap", "min_score_gap": 0.0})
    values = sorted(set(scores[np.isfinite(scores)].tolist()))
    steps = data.draw(
        st.lists(st.integers(1, 1000), min_size=len(values), max_size=len(values)), label="steps"
    )
    changed = dict(zip(values, np.cumsum(steps) - 500.0, strict=True))
    other = [changed[value] if np.isfinite(value) else value for value in scores.tolist()]

    def formed(of):
        pairs = pairs_of("a dog", np.asarray(of, np.float32), by_rank, 7)
        return [(p.pair_id, p.tier, p.winner_rank, p.loser_rank) for p in pairs]

    assert formed(scores) == formed(other)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=4), SCORES, max_size=6),
    CURRICULA,
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_neither_order_of_prompts_nor_number_of_ranks_counts(
    scores, curriculum, world_size, chance
):
    """Ranks that share the prompts in any order form, together, what one rank forms."""
    alone = {p: pairs_of(p, values, curriculum, 3) for p, values in scores.items()}
    prompts = list(scores)
    chance.shuffle(prompts)
    together = {}
    for rank in range(world_size):
        ranks = Ranks(rank, world_size, 0, torch.device("cpu"))
        for prompt in ranks.share(prompts):
            assert prompt not in together
            together[prompt] = pairs_of(prompt, scores[prompt], curriculum, 3)
    assert together == alone


@pytest.mark.parametrize("num_ranked", [2, 10, 11, 13])
def test_tiers_hold_the_published_intervals(num_ranked):
    scores = np.random.default_rng(1).permutation(num_ranked).astype(np.float32)
    whole, num_tiers = num_ranked - 1, 5
    curriculum = Curriculum(tiers=num_tiers, pairs_per_prompt_per_tier=1000)
    for pair in pairs_of("a dog", scores, curriculum, 0):
        gap = num_tiers * (pair.loser_rank - pair.winner_rank)
        assert whole * (num_tiers - pair.tier) < gap <= whole * (num_tiers - pair.tier + 1)


def test_failed_rewards_are_dropped_before_ranks_are_given():
    pairs = form_pairs("x", np.array([3, np.nan, 1, np.inf]), Curriculum(tiers=1), 0)
    assert [(p.winner, p.loser, p.winner_rank, p.loser_rank) for p in named(pairs.pairs)] == [
        (0, 2, 1, 2)
    ]
    assert pairs.dropped_candidates == 2
    assert not pairs.all_tied


@pytest.mark.parametrize(
    ("scores", "all_tied"),
    [([0.5] * 4, True), ([0.5, 0.5, np.nan], True), ([0.5], False), ([], False)],
)
def test_ties_and_too_few(scores, all_tied):
    formed = form_pairs("x", np.array(scores, dtype=np.float32), Curriculum(), 0)
    assert named(formed.pairs) == []
    assert formed.all_tied is all_tied


def test_the_budget_is_drawn_by_prompt_and_seed_and_nothing_else():
    scores = np.random.default_rng(0).normal(size=30).astype(np.float32)
    curriculum = Curriculum(pairs_per_prompt_per_tier=4)
    prompts = [f"prompt {number}" for number in range(6)]
    formed = [pairs_of(prompt, scores, curriculum, 5) for prompt in prompts]
    assert len({tuple((p.winner, p.loser) for p in pairs) for pairs in formed}) == len(prompts)
    assert pairs_of(prompts[0], scores, curriculum, 6) != formed[0]


def test_every_pair_of_a_tier_has_the_same_chance():
    scores = np.arange(8, dtype=np.float32)
    curriculum = Curriculum(tiers=1, pairs_per_prompt_per_tier=7)
    counts = Counter(
        (pair.winner, pair.loser)
        for seed in range(1200)
        for pair in pairs_of("x", scores, curriculum, seed)
    )
    assert len(counts) == 28
    statistic = sum((count - 300) ** 2 / (300 * 0.75) for count in counts.values()) * 27 / 28
    assert statistic < 55.5  # chi-square, 27 degrees, p = 0.001


def test_five_hundred_candidates_are_quick():
    scores = np.random.default_rng(0).normal(size=500).astype(np.float32)
    form_pairs("warm up", scores, Curriculum(), 0)
    start = time.process_time()
    formed = form_pairs("a dog", scores, Curriculum(), 0)
    assert time.process_time() - start < 1
    assert formed.num_eligible == 500 * 499 // 2
    assert len(named(formed.pairs)) == 5 * 32
