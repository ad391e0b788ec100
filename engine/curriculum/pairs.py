"""Preference pairs of one prompt: who beats whom, how hard the pair is, and which are kept.

All pairs of M candidates would repeat each image up to M-1 times, so each tier keeps a budget,
drawn by key: the pairs of a prompt depend on its text, its scores, the curriculum and the seed,
never on the other prompts or on which rank asks.

Tiers go from 1, the easiest (largest gap), to B, the hardest. With M ranked candidates, tier k of
equal width holds the pairs whose gap in rank satisfies

    (M-1)(B-k)/B  <  j-i  <=  (M-1)(B-k+1)/B,

and the same intervals of the score gap, with the prompt's range of scores in place of M-1.
Quantile tiers hold equally many pairs (to within one) of every prompt, in order of the gap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..basics.keyed import Permutation, Stream, content_id
from ..recipe import Curriculum

PAIR = np.dtype(
    [
        ("id", np.int64),
        ("tier", np.int32),
        ("winner", np.int64),
        ("loser", np.int64),
        ("ranks", np.int32, 2),
        ("scores", np.float64, 2),  # shares of masked prompts are no float32
    ]
)
"""A preference; of two ranks or scores the winner's comes first; rank 1 is the best."""


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


@dataclass(frozen=True, slots=True)
class PromptPairs:
    """The pairs of one prompt, rows of :data:`PAIR` with candidates by their index, and what was
    left out of it.

    ``dropped_candidates`` had no finite score; ``all_tied`` says that no candidate is better than
    another (two or more of them, all with one score); ``num_eligible`` counts the pairs before
    the budget.
    """

    pairs: np.ndarray
    dropped_candidates: int
    all_tied: bool
    num_eligible: int


def form_pairs(prompt: str, scores: np.ndarray, curriculum: Curriculum, seed: int) -> PromptPairs:
    """Form, tier and budget the pairs of one prompt from ``scores`` (M,) float32, NaN for failed.

    Memory and time are O(M^2) of numpy. Pairs come sorted by tier, then winner's and loser's rank.
    """
    scores = np.asarray(scores, dtype=np.float32)
    ranking = rank_candidates(scores)
    ranked = scores[ranking.order].astype(np.float64)
    if len(ranked) < 2 or ranked[0] == ranked[-1]:
        return PromptPairs(np.zeros(0, PAIR), ranking.dropped, len(ranked) > 1, 0)
    winners, losers = np.triu_indices(len(ranked), k=1)
    gaps = ranked[winners] - ranked[losers]
    eligible = (gaps > 0) & (gaps >= curriculum.min_score_gap)
    winners, losers, gaps = winners[eligible], losers[eligible], gaps[eligible]
    tiers = _tiers(losers - winners, gaps, ranked, curriculum)
    kept = _within_budget(tiers, content_id(prompt), curriculum, seed)
    winners, losers = winners[kept], losers[kept]
    pairs = np.zeros(len(kept), PAIR)
    pairs["winner"], pairs["loser"] = ranking.order[winners], ranking.order[losers]
    named = zip(pairs["winner"].tolist(), pairs["loser"].tolist(), strict=True)
    pairs["id"] = [content_id(prompt, str(winner), str(loser)) for winner, loser in named]
    pairs["tier"] = tiers[kept]
    pairs["ranks"] = np.stack([winners, losers], axis=1) + 1
    pairs["scores"] = np.stack([ranked[winners], ranked[losers]], axis=1)
    return PromptPairs(pairs, ranking.dropped, False, len(tiers))


def _tiers(
    rank_gaps: np.ndarray, score_gaps: np.ndarray, ranked: np.ndarray, curriculum: Curriculum
) -> np.ndarray:
    by_rank = curriculum.difficulty == "rank_gap"
    if curriculum.binning == "quantile":
        return quantile_tiers(rank_gaps if by_rank else score_gaps, curriculum.tiers)
    if by_rank:
        return equal_width_rank_tiers(rank_gaps, len(ranked), curriculum.tiers)
    return equal_width_score_tiers(score_gaps, float(ranked[0] - ranked[-1]), curriculum.tiers)


def _within_budget(
    tiers: np.ndarray, prompt_id: int, curriculum: Curriculum, seed: int
) -> np.ndarray:
    """Indices of the kept pairs. A larger budget keeps what a smaller one kept, and more."""
    kept = []
    for tier in range(1, curriculum.tiers + 1):
        members = np.flatnonzero(tiers == tier)
        if len(members) > curriculum.pairs_per_prompt_per_tier:
            shuffle = Permutation(len(members), seed, Stream.PAIR_BUDGET, prompt_id, tier)
            drawn = shuffle.at(np.arange(curriculum.pairs_per_prompt_per_tier))
            members = members[np.sort(drawn)]
        kept.append(members)
    return np.concatenate(kept)
