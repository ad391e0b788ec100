"""Preference pairs of one prompt: who beats whom, how hard the pair is, and which are kept.

All pairs of M candidates would repeat each image up to M-1 times, so each tier keeps a budget,
drawn by key: the pairs of a prompt depend on its text, its scores, the curriculum and the seed,
never on the other prompts or on which rank asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..basics.keyed import Permutation, Stream, content_id
from ..recipe import Curriculum
from .ranking import Ranking, rank_candidates
from .tiers import equal_width_rank_tiers, equal_width_score_tiers, quantile_tiers


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference. ``winner`` and ``loser`` are candidate indices; rank 1 is the best."""

    pair_id: int
    prompt: str
    tier: int
    winner: int
    loser: int
    winner_rank: int
    loser_rank: int
    winner_score: float
    loser_score: float


@dataclass(frozen=True, slots=True)
class PromptPairs:
    """The pairs of one prompt, and what was left out of it.

    ``dropped_candidates`` had no finite score; ``all_tied`` says that no candidate is better than
    another (two or more of them, all with one score); ``num_eligible`` counts the pairs before
    the budget.
    """

    pairs: list[Pair]
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
        return PromptPairs([], ranking.dropped, len(ranked) > 1, 0)
    winners, losers = np.triu_indices(len(ranked), k=1)
    gaps = ranked[winners] - ranked[losers]
    eligible = (gaps > 0) & (gaps >= curriculum.min_score_gap)
    winners, losers, gaps = winners[eligible], losers[eligible], gaps[eligible]
    tiers = _tiers(losers - winners, gaps, ranked, curriculum)
    kept = _within_budget(tiers, content_id(prompt), curriculum, seed)
    pairs = [_pair(prompt, ranking, scores, *row) for row in _rows(kept, tiers, winners, losers)]
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


def _rows(
    kept: np.ndarray, tiers: np.ndarray, winners: np.ndarray, losers: np.ndarray
) -> zip[tuple[int, int, int]]:
    return zip(tiers[kept].tolist(), winners[kept].tolist(), losers[kept].tolist(), strict=True)


def _pair(
    prompt: str, ranking: Ranking, scores: np.ndarray, tier: int, above: int, below: int
) -> Pair:
    winner, loser = int(ranking.order[above]), int(ranking.order[below])
    return Pair(
        pair_id=content_id(prompt, str(winner), str(loser)),
        prompt=prompt,
        tier=tier,
        winner=winner,
        loser=loser,
        winner_rank=above + 1,
        loser_rank=below + 1,
        winner_score=float(scores[winner]),
        loser_score=float(scores[loser]),
    )
