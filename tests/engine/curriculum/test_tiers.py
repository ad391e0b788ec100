from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from cdpo.engine.curriculum.pairs import (
    equal_width_rank_tiers,
    equal_width_score_tiers,
    quantile_tiers,
)
from hypothesis import given
from hypothesis import strategies as st


def oracle(gap: Fraction, whole: Fraction, num_tiers: int) -> int:
    """The tier by the intervals as published, in exact fractions, one by one."""
    found = [
        k
        for k in range(1, num_tiers + 1)
        if whole * Fraction(num_tiers - k, num_tiers)
        < gap
        <= whole * Fraction(num_tiers - k + 1, num_tiers)
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("num_tiers", [1, 2, 3, 5, 7, 12])
@pytest.mark.parametrize("num_ranked", [2, 3, 6, 11, 50, 101])
def test_rank_intervals_are_those_of_the_method(num_ranked, num_tiers):
    gaps = np.arange(1, num_ranked)
    tiers = equal_width_rank_tiers(gaps, num_ranked, num_tiers)
    whole = Fraction(num_ranked - 1)
    assert tiers.tolist() == [oracle(Fraction(int(gap)), whole, num_tiers) for gap in gaps]


@given(
    st.lists(st.floats(-40, 40, width=32), min_size=2, max_size=12, unique=True),
    st.integers(1, 9),
)
def test_score_intervals_are_those_of_the_method(scores, num_tiers):
    """Rewards of one model lie within a few powers of two, where the comparison is exact."""
    scores = [float(np.round(score * 2**12) / 2**12) for score in scores]
    gaps = sorted({abs(a - b) for a in scores for b in scores if a != b})
    if not gaps:
        return
    tiers = equal_width_score_tiers(np.array(gaps), gaps[-1], num_tiers)
    whole = Fraction(gaps[-1])
    assert tiers.tolist() == [oracle(Fraction(gap), whole, num_tiers) for gap in gaps]


def test_score_gaps_on_an_edge_belong_to_the_harder_tier():
    """0.2, 0.4 … of a range of 1: a quotient in floating point would misplace some of them."""
    gaps = np.arange(1, 6) * np.float64(3.0)
    assert equal_width_score_tiers(gaps, 15.0, 5).tolist() == [5, 4, 3, 2, 1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(1, 9))
def test_quantiles_hold_equal_counts_in_order_of_the_gap(gaps, num_tiers):
    gaps = np.array(gaps)
    tiers = quantile_tiers(gaps, num_tiers)
    counts = np.bincount(tiers, minlength=num_tiers + 1)[1:]
    assert len(counts) == num_tiers
    if len(gaps) >= num_tiers:
        assert counts.max() - counts.min() <= 1
    by_tier = [gaps[tiers == tier] for tier in range(1, num_tiers + 1) if (tiers == tier).any()]
    assert all(easier.min() >= harder.max() for easier, harder in pairwise(by_tier))
