"""What a set of shards holds, in numbers: counts by tier, and how scores and their gaps spread.

The counts are the manifest's; the spreads are of pairs read here and there in every tier, so that
a set of any size is looked at in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..manifest import Manifest, ShardEntry, shards_by_tier
from ..reader import ShardReaders
from ..sample import PairSample

PAIRS_PER_TIER = 2000
SHARDS_PER_TIER = 16
BINS = 32
_BARS = {True: " ▁▂▃▄▅▆▇█", False: " .:-=+*#@"}


@dataclass(frozen=True)
class TierSurvey:
    """Pairs of one tier that were read: ``scores`` and ``ranks`` (n, 2), the winner's first."""

    tier: int
    num_pairs: int
    num_shards: int
    num_bytes: int
    scores: np.ndarray
    ranks: np.ndarray

    @property
    def gaps(self) -> np.ndarray:
        """(n,) by how much the winner's score is higher."""
        return self.scores[:, 0] - self.scores[:, 1]

    @property
    def rank_gaps(self) -> np.ndarray:
        """(n,) by how many ranks the winner is better."""
        return self.ranks[:, 1] - self.ranks[:, 0]


def survey(
    folder: str | Path, manifest: Manifest, pairs_per_tier: int = PAIRS_PER_TIER
) -> list[TierSurvey]:
    """Read at most ``pairs_per_tier`` pairs of each tier. Raises ShardError for a bad shard."""
    readers = ShardReaders(folder, manifest)
    surveys = []
    for tier, entries in sorted(shards_by_tier(manifest.shards).items()):
        metas = [sample.meta for sample in pairs_of(readers, entries, pairs_per_tier)]
        surveys.append(
            TierSurvey(
                tier=tier,
                num_pairs=sum(entry.count for entry in entries),
                num_shards=len(entries),
                num_bytes=sum(entry.bytes for entry in entries),
                scores=np.array([meta.scores for meta in metas]),
                ranks=np.array([meta.ranks for meta in metas]),
            )
        )
    readers.close()
    return surveys


def pairs_of(
    readers: ShardReaders, entries: Sequence[ShardEntry], at_most: int
) -> Iterator[PairSample]:
    """Pairs of shards of one tier, evenly spread over at most SHARDS_PER_TIER of them."""
    chosen = spread(len(entries), min(SHARDS_PER_TIER, at_most))
    for number, index in enumerate(chosen):
        share = at_most * (number + 1) // len(chosen) - at_most * number // len(chosen)
        entry = entries[index]
        for sample in spread(entry.count, share):
            yield readers.read(entry, sample)


def spread(count: int, at_most: int) -> list[int]:
    """At most so many of ``range(count)``, evenly spaced, the first among them."""
    taken = min(count, at_most)
    return [index * count // taken for index in range(taken)]


def sparkline(values: np.ndarray, low: float, high: float, *, unicode: bool = True) -> str:
    """A histogram of ``values`` (n,) over [low, high] in BINS characters; the fullest bin is full,
    and one with anything in it is not blank.
    """
    counts, _ = np.histogram(values, BINS, (low, high) if high > low else (low - 0.5, low + 0.5))
    bars = _BARS[unicode]
    heights = np.ceil(counts / max(1, counts.max()) * (len(bars) - 1)).astype(int)
    return "".join(bars[height] for height in heights)
