"""Pairs in tiers, as rows of numbers, so that a million of them are no burden.

Image ``k`` of record ``r`` has the number ``r K + k``, K being the images of a record.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..basics.errors import DataError
from ..recipe import Curriculum
from .pairs import PAIR, equal_width_score_tiers, form_pairs, quantile_tiers

DISAGREE, TOO_CLOSE, UNSCORED = "scores contradict the label", "scores too close", "without a score"
SWAPPED, KEPT = "labels overruled by scores", "labels kept against scores"
ONE_IMAGE, ALL_TIE = "only scored images of a caption", "images of captions that all tie"
ONE_PICTURE = "winner and loser are one picture"
MAX_OF_CAPTION = 4096  # pairs of n images take memory in n squared


@dataclass(frozen=True)
class PairsMade:
    """Rows of :data:`PAIR`; pairs before any budget; and what became of the others.

    ``lost`` are the numbers of records that are in no pair, by reason; ``remarks`` those that are,
    but not as they stand; ``tied`` the first image of every caption whose images all tie.
    """

    pairs: np.ndarray
    eligible: int
    lost: Mapping[str, np.ndarray] = field(default_factory=dict)
    remarks: Mapping[str, np.ndarray] = field(default_factory=dict)
    tied: Sequence[int] = ()

    @property
    def counts(self) -> Counter[str]:
        """How many there are of each of both."""
        both = {**self.lost, **self.remarks}
        return Counter({reason: len(rows) for reason, rows in both.items() if len(rows)})


def without_equal(made: PairsMade, equal: np.ndarray, each: int) -> PairsMade:
    """Pairs without those that are ``equal`` (P,) bool: a picture is not preferred to itself.
    Records of ``each`` images that are in no other pair are lost.
    """
    pairs, gone = made.pairs[~equal], made.pairs[equal]
    used = np.concatenate([pairs["winner"], pairs["loser"]]) // each
    records = np.unique(np.concatenate([gone["winner"], gone["loser"]]) // each)
    lost = {**made.lost, ONE_PICTURE: np.setdiff1d(records, used)}
    return replace(made, pairs=pairs, lost=lost)


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
    against = gaps < 0
    finite = np.isfinite(first).all(axis=1)
    far = (gaps != 0) & (np.abs(gaps) >= curriculum.min_score_gap)
    keep = finite & far
    lost = {UNSCORED: np.flatnonzero(~finite), TOO_CLOSE: np.flatnonzero(finite & ~far)}
    disagree, remarks = np.flatnonzero(keep & against), {}
    swapped = against & (on_disagreement == "swap")
    if on_disagreement == "drop":
        lost[DISAGREE] = disagree
        keep &= ~against
    else:
        remarks[SWAPPED if on_disagreement == "swap" else KEPT] = disagree
    winners = np.where(swapped, 1 - winners, winners)
    first[swapped] = first[swapped, ::-1]
    gaps = np.where(swapped, -gaps, gaps)[keep]
    pairs = np.zeros(len(gaps), PAIR)
    pairs["id"], pairs["tier"] = ids[keep], _tiers(gaps, curriculum)
    pairs["winner"] = (2 * rows + winners)[keep]
    pairs["loser"] = (2 * rows + 1 - winners)[keep]
    pairs["ranks"], pairs["scores"] = (1, 2), first[keep]
    return PairsMade(pairs, len(pairs), lost, remarks)


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
    lost: dict[str, list[np.ndarray]] = {UNSCORED: [], ONE_IMAGE: [], ALL_TIE: []}
    eligible, scored = 0, np.isfinite(scores)
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
        ranked = members[scored[members]]
        lost[UNSCORED].append(members[~scored[members]])
        if len(ranked) == 1:
            lost[ONE_IMAGE].append(ranked)
        if outcome.all_tied:
            lost[ALL_TIE].append(ranked)
            tied.append(int(members[0]))
        eligible += outcome.num_eligible
        for side in ("winner", "loser"):
            places: np.ndarray = outcome.pairs[side]  # typed: mypy takes 8 s to find out
            outcome.pairs[side] = members[places]
        chunks.append(outcome.pairs)
    none = np.zeros(0, np.int64)
    sorted_lost = {reason: np.sort(np.concatenate([none, *own])) for reason, own in lost.items()}
    return PairsMade(np.concatenate(chunks), eligible, sorted_lost, tied=tied)


def _groups(ids: np.ndarray) -> Iterator[np.ndarray]:
    """The positions of each value, those of one value in their order."""
    order = np.argsort(ids, kind="stable")
    borders = np.flatnonzero(np.diff(ids[order])) + 1
    yield from np.split(order, borders) if len(order) else ()
