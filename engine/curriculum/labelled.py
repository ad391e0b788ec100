"""Pairs in tiers, as rows of numbers, so that a million of them are no burden.

Image ``k`` of record ``r`` has the number ``r K + k``, K being the images of a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..basics.errors import DataError
from ..recipe import Curriculum
from .pairs import PAIR, equal_width_score_tiers, form_pairs, quantile_tiers

DISAGREE, TOO_CLOSE, UNSCORED = "scores contradict the label", "scores too close", "without a score"
SWAPPED, KEPT = "labels overruled by scores", "labels kept against scores"
ONE_IMAGE, ALL_TIE = "captions with one image", "captions whose images all tie"
MAX_OF_CAPTION = 4096  # pairs of n images take memory in n squared


@dataclass(frozen=True)
class PairsMade:
    """Rows of :data:`PAIR`; what was left out or changed, by reason; pairs before any budget; the
    first image of every caption whose images all tie.
    """

    pairs: np.ndarray
    counts: Counter[str]
    eligible: int
    tied: Sequence[int] = ()


def labelled_pairs(
    ids: np.ndarray,
    winners: np.ndarray,
    scores: np.ndarray,
    on_disagreement: str,
    curriculum: Curriculum,
) -> PairsMade:
    """Pairs of records with a label.

    Args:
        ids: (N,) int64, one a record.
        winners: (N,) place, 0 or 1, of the image that its label prefers.
        scores: (N, 2) float32; NaN where there is none.
        on_disagreement: what happens where the other image has the higher score.
        curriculum: number and binning of tiers, and the least gap.

    A record is one pair and most captions have only one, so tiers are cut over the whole set: by
    the gap (winner's score minus loser's, negative for a label kept against the scores), largest
    first, into parts of equal count or of equal width between the smallest gap and the largest.
    """
    rows = np.arange(len(ids))
    first = np.stack([scores[rows, winners], scores[rows, 1 - winners]], axis=1)
    gaps = first[:, 0].astype(np.float64) - first[:, 1]
    against, counts = gaps < 0, Counter[str]()
    finite = np.isfinite(first).all(axis=1)
    far = (gaps != 0) & (np.abs(gaps) >= curriculum.min_score_gap)
    keep = finite & far
    counts[UNSCORED] = int((~finite).sum())
    counts[TOO_CLOSE] = int((finite & ~far).sum())
    reason = {"drop": DISAGREE, "swap": SWAPPED, "keep": KEPT}[on_disagreement]
    counts[reason] = int((keep & against).sum())
    swapped = against & (on_disagreement == "swap")
    if on_disagreement == "drop":
        keep &= ~against
    winners = np.where(swapped, 1 - winners, winners)
    first[swapped] = first[swapped, ::-1]
    gaps = np.where(swapped, -gaps, gaps)[keep]
    pairs = np.zeros(len(gaps), PAIR)
    pairs["id"], pairs["tier"] = ids[keep], _tiers(gaps, curriculum)
    pairs["winner"] = (2 * rows + winners)[keep]
    pairs["loser"] = (2 * rows + 1 - winners)[keep]
    pairs["ranks"], pairs["scores"] = (1, 2), first[keep]
    return PairsMade(pairs, +counts, len(pairs))


def _tiers(gaps: np.ndarray, curriculum: Curriculum) -> np.ndarray:
    if not len(gaps):
        return np.zeros(0, np.int64)
    if curriculum.binning == "quantile":
        return quantile_tiers(gaps, curriculum.tiers)
    lowest = min(0.0, float(gaps.min()))
    return equal_width_score_tiers(gaps - lowest, float(gaps.max()) - lowest, curriculum.tiers)


def ranked_pairs(
    caption_ids: np.ndarray,
    scores: np.ndarray,
    caption_of: Callable[[int], str],
    curriculum: Curriculum,
    seed: int,
    most: int = MAX_OF_CAPTION,
) -> PairsMade:
    """Pairs of the images (N,) of each caption, which are its candidates in their order.

    DataError if one has over ``most``.
    """
    tied, chunks = [], [np.zeros(0, PAIR)]
    counts, eligible = Counter[str](), 0
    for members in _groups(caption_ids):
        caption = caption_of(int(members[0]))
        if len(members) > most:
            raise DataError(
                f"prepare.source: {len(members)} images have the caption {caption[:60]!r}, at most "
                f"{most} can be ranked together: is prepare.source.caption the right one?",
                "prepare.source.caption",
                "too-large",
            )
        outcome = form_pairs(caption, scores[members], curriculum, seed)
        counts[UNSCORED] += outcome.dropped_candidates
        counts[ONE_IMAGE] += len(members) == 1
        counts[ALL_TIE] += outcome.all_tied
        tied += [int(members[0])] * outcome.all_tied
        eligible += outcome.num_eligible
        for side in ("winner", "loser"):
            outcome.pairs[side] = members[outcome.pairs[side]]
        chunks.append(outcome.pairs)
    return PairsMade(np.concatenate(chunks), +counts, eligible, tied)


def _groups(ids: np.ndarray) -> Iterator[np.ndarray]:
    """The positions of each value, those of one value in their order."""
    order = np.argsort(ids, kind="stable")
    borders = np.flatnonzero(np.diff(ids[order])) + 1
    yield from np.split(order, borders) if len(order) else ()
