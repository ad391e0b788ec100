"""``cdpo shards show``: a set of shards on one screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...display.terminal import Terminal
from ..manifest import Manifest
from .survey import TierSurvey, sparkline


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
