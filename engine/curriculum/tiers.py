"""Difficulty tiers of the pairs of one prompt: 1 the easiest (largest gap) to B the hardest.

With M ranked candidates, tier k of equal width holds the pairs whose gap in rank satisfies

    (M-1)(B-k)/B  <  j-i  <=  (M-1)(B-k+1)/B,

and the same intervals of the score gap, with the prompt's range of scores in place of M-1.
Quantile tiers hold equally many pairs (to within one) of every prompt, in order of the gap.
"""

from __future__ import annotations

import numpy as np


def equal_width_rank_tiers(rank_gaps: np.ndarray, num_ranked: int, num_tiers: int) -> np.ndarray:
    """Tiers (P,) int64 of rank gaps (P,) in 1..M-1, in integers, so that no edge can slip."""
    gaps = np.asarray(rank_gaps, dtype=np.int64)
    steps_up = -((-gaps * num_tiers) // (num_ranked - 1))
    return num_tiers + 1 - steps_up


def equal_width_score_tiers(
    score_gaps: np.ndarray, score_range: float, num_tiers: int
) -> np.ndarray:
    """Tiers (P,) int64 of positive float64 score gaps, at most ``score_range`` = max - min.

    Gap times B is compared with multiples of the range: differences of float32 rewards and their
    products with B are exact in float64 (for rewards within 2**20 of one another in size), where
    a quotient would round at the edges.
    """
    edges = score_range * np.arange(1, num_tiers, dtype=np.float64)
    above = np.searchsorted(edges, np.asarray(score_gaps, np.float64) * num_tiers, side="left")
    return (num_tiers - above).astype(np.int64)


def quantile_tiers(gaps: np.ndarray, num_tiers: int) -> np.ndarray:
    """Tiers (P,) int64 of equal count: pairs sorted by gap, largest first, and cut into B parts.

    Equal gaps keep the order they are given in and may fall on both sides of a cut, because counts
    are what this binning promises. With fewer pairs than tiers some tiers stay empty.
    """
    order = np.argsort(-np.asarray(gaps), kind="stable")
    tiers = np.empty(len(order), dtype=np.int64)
    tiers[order] = 1 + np.arange(len(order), dtype=np.int64) * num_tiers // max(1, len(order))
    return tiers
