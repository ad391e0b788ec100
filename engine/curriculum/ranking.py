"""Ranks of one prompt's candidates by their reward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ranking:
    """The candidates of a prompt, best first.

    ``order`` (R,) int64 holds the candidate indices that have a finite score, best first;
    ``ranks`` (M,) int64 the rank of every candidate, 1 the best and 0 for a dropped one;
    ``dropped`` counts the candidates without a finite score.
    """

    order: np.ndarray
    ranks: np.ndarray
    dropped: int


def rank_candidates(scores: np.ndarray) -> Ranking:
    """Rank candidates by score, highest first, the lower index first among equals.

    A score that is not finite is the mark of a failed reward. It never becomes a number: a
    failure mapped to 0 would be a valid-looking score that reorders the curriculum.
    """
    scores = np.asarray(scores)
    if scores.ndim != 1:
        raise ValueError(f"scores must be one row (M,), got shape {scores.shape}")
    finite = np.flatnonzero(np.isfinite(scores))
    order = finite[np.argsort(-scores[finite], kind="stable")].astype(np.int64)
    ranks = np.zeros(len(scores), dtype=np.int64)
    ranks[order] = np.arange(1, len(order) + 1)
    return Ranking(order, ranks, len(scores) - len(order))
