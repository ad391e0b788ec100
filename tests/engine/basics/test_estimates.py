"""Bootstrap intervals against analytic truth, and the cases that have none."""

import math

import numpy as np
import pytest
from cdpo.engine.basics.estimates import (
    mean_estimate,
    paired_difference,
    paired_summary,
    win_matrix,
    win_rate,
    worst_pairs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays


def test_difference_agrees_with_the_normal_interval_of_prompt_means():
    """For many prompts the percentile bootstrap tends to mean ± 1.96 s/√P over prompt means."""
    generator = np.random.default_rng(0)
    base = generator.normal(0, 1, (400, 4))
    effect = generator.normal(0.2, 0.5, (400, 1))  # images of a prompt share it: clusters
    tuned = base + effect + generator.normal(0, 0.1, (400, 4))
    estimate = paired_difference(base, tuned, resamples=4000, seed=3)
    means = (tuned - base).mean(axis=1)
    half = 1.96 * means.std(ddof=1) / math.sqrt(400)
    assert estimate.mean == pytest.approx(means.mean(), abs=1e-12)
    assert estimate.low == pytest.approx(means.mean() - half, abs=0.06 * half)
    assert estimate.high == pytest.approx(means.mean() + half, abs=0.06 * half)
    # Resampling images as if independent would be about half as wide.
    naive = 1.96 * (tuned - base).std() / math.sqrt(1600)
    assert (estimate.high - estimate.low) / 2 > 1.5 * naive


def test_coverage_is_about_95_percent():
    generator = np.random.default_rng(1)
    hits = 0
    for seed in range(300):
        prompt = generator.normal(0.1, 1, (40, 1))
        values = prompt + generator.normal(0, 1, (40, 3))
        estimate = mean_estimate(values, resamples=400, seed=seed)
        hits += estimate.low <= 0.1 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.98  # a little under 0.95 is the nature of percentile intervals


def test_same_seed_same_interval():
    values = np.random.default_rng(2).normal(size=(30, 2))
    assert mean_estimate(values, 300, seed=5) == mean_estimate(values, 300, seed=5)
    assert mean_estimate(values, 300, seed=5) != mean_estimate(values, 300, seed=6)


def test_win_rate_counts_ties_half():
    base = [[0.0, 0.0], [1.0, 1.0]]
    tuned = [[1.0, 0.0], [1.0, 0.0]]  # win, tie, tie, loss
    assert win_rate(base, tuned, 100).mean == 0.5


def test_pairs_without_a_score_count_for_neither_side():
    base = np.array([[1.0, 2.0], [3.0, np.nan], [np.nan, np.nan]])
    tuned = np.array([[2.0, np.inf], [5.0, 100.0], [1.0, 1.0]])
    summary = paired_summary(base, tuned, 100)
    assert summary.num_dropped == 4
    assert (summary.num_pairs, summary.num_prompts) == (2, 2)
    assert summary.base.mean == 2.0 and summary.tuned.mean == 3.5
    assert summary.difference.mean == pytest.approx(summary.tuned.mean - summary.base.mean)
    assert summary.win_rate.mean == 1.0


def test_what_cannot_be_estimated_is_nan():
    one = mean_estimate([[1.0, 3.0]], 100)
    assert one.mean == 2.0 and math.isnan(one.low) and math.isnan(one.high)
    none = paired_difference([[np.nan]], [[1.0]], 100)
    assert math.isnan(none.mean) and math.isnan(none.low)
    assert math.isnan(mean_estimate(np.zeros((0, 4)), 100).mean)


def test_worst_pairs_are_losses_only_worst_first():
    base = [[1.0, 1.0, 1.0], [1.0, np.nan, 1.0]]
    tuned = [[0.5, 1.0, 2.0], [0.1, 0.0, 0.9]]
    assert worst_pairs(base, tuned, 10) == [(1, 0), (0, 0), (1, 2)]
    assert worst_pairs(base, tuned, 1) == [(1, 0)]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="same prompts and seeds"):
        paired_difference(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"\(prompts, images\)"):
        mean_estimate(np.zeros(3))


# Few values, so that ties are common; NaN where a scorer failed.
SCORES = st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan])


@settings(max_examples=40, deadline=None)
@given(arrays(np.float64, (3, 4, 2), elements=SCORES))
def test_win_rates_are_antisymmetric(tables):
    """What a model wins, ties half, is what the other loses; means are those of plain counting."""
    matrix = win_matrix(list(tables), resamples=50, seed=1)
    for i, row in enumerate(matrix):
        for j, cell in enumerate(row):
            other = matrix[j][i]
            for one, two in ((cell.mean, other.mean), (cell.low, other.high)):
                assert one + two == pytest.approx(1) or (math.isnan(one) and math.isnan(two))
            pairs = [
                (a > b) + (a == b) / 2
                for a, b in zip(tables[i].flat, tables[j].flat, strict=True)
                if not (math.isnan(a) or math.isnan(b))
            ]
            counted = float(np.mean(pairs)) if pairs else math.nan
            assert cell.mean == pytest.approx(0.5 if i == j else counted, nan_ok=True)
            assert not cell.low > cell.high


def test_kept_draws_are_those_of_blocks(monkeypatch):
    """Large comparisons draw in blocks, small ones once for all estimates: the same numbers."""
    values = np.random.default_rng(2).normal(size=(30, 2))
    kept = mean_estimate(values, resamples=500, seed=7)
    monkeypatch.setattr("cdpo.engine.basics.estimates._CHUNK_ELEMENTS", 30 * 100)
    assert mean_estimate(values, resamples=500, seed=7) == kept
