"""``cdpo shards show``: a set of shards on one screen, in numbers.

Counts by tier are the manifest's; how scores and their gaps spread is of pairs read here and there
in every tier, so that a set of any size is looked at in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...display.terminal import Terminal
from ...shards.manifest import Manifest, ShardEntry, shards_by_tier
from ...shards.reader import ShardReaders
from ...shards.sample import PairSample

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


def show(
    folder: str | Path,
    manifest: Manifest,
    tiers: Sequence[TierSurvey],
    terminal: Terminal,
    *,
    unicode: bool = True,
) -> None:
    """Print where the set comes from, its counts by tier, and how scores and gaps spread."""
    terminal.header(f"shards  {folder}", _origin(manifest))
    terminal.line()
    terminal.table(
        "tiers, easiest first",
        ("tier", "pairs", "shards", "pairs a shard", "MiB", "rank gap"),
        [_counts(tier) for tier in tiers],
    )
    read = sum(len(tier.scores) for tier in tiers)
    of = "all" if read == manifest.num_pairs else f"{read} of {manifest.num_pairs}"
    for name, values in (
        ("winner's score less loser's", [tier.gaps for tier in tiers]),
        ("score of winners", [tier.scores[:, 0] for tier in tiers]),
        ("score of losers", [tier.scores[:, 1] for tier in tiers]),
    ):
        terminal.line()
        _histograms(f"{name} ({of} pairs)", tiers, values, terminal, unicode)


def _origin(manifest: Manifest) -> list[tuple[str, str]]:
    height, width = manifest.resolution
    shape = "x".join(str(size) for size in manifest.latent_shape)
    numbers = manifest.statistics
    rows = [
        ("holds", f"{manifest.num_pairs} pairs, {manifest.kind} {shape} of {width}x{height} px"),
        ("lanes", str(manifest.lanes)),
        ("model", manifest.model.path),
        ("VAE", f"{manifest.vae.path} (weights {manifest.vae.fingerprint[:12]})"),
        ("ranked by", f"{manifest.reward.type} {manifest.reward.path}"),
        (
            "made of",
            f"{numbers.prompts} prompts, {numbers.candidates} candidates, "
            f"{numbers.eligible_pairs} eligible pairs, "
            f"{sum(numbers.dropped_remainder_by_tier)} left out to fill shards",
        ),
        ("by", f"cdpo {manifest.created_by}, seed {manifest.seed}"),
    ]
    if numbers.imported:
        said = ", ".join(f"{count} {reason}" for reason, count in numbers.imported.items())
        rows.insert(-1, ("imported", said))
    return rows


def _counts(tier: TierSurvey) -> tuple[str, ...]:
    low, high = int(tier.rank_gaps.min()), int(tier.rank_gaps.max())
    return (
        str(tier.tier),
        str(tier.num_pairs),
        str(tier.num_shards),
        str(tier.num_pairs // tier.num_shards),
        f"{tier.num_bytes / 2**20:.1f}",
        str(low) if low == high else f"{low} to {high}",
    )


def _histograms(
    title: str,
    tiers: Sequence[TierSurvey],
    values: Sequence[np.ndarray],
    terminal: Terminal,
    unicode: bool,
) -> None:
    """A row a tier, all over the same range, so that tiers can be compared."""
    low = min(float(part.min()) for part in values)
    high = max(float(part.max()) for part in values)
    rows = []
    for tier, part in zip(tiers, values, strict=True):
        least, median, most = (f"{value:.4g}" for value in np.quantile(part, (0.05, 0.5, 0.95)))
        bars = sparkline(part, low, high, unicode=unicode)
        rows.append((str(tier.tier), f"|{bars}|", least, median, most))
    columns = ("tier", f"{low:.4g} to {high:.4g}", "5 %", "median", "95 %")
    terminal.table(title, columns, rows)
