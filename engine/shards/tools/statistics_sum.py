"""The statistics of a set that was made out of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..manifest import Statistics
from ..writer import ShardPlan

_ADDED = (
    "prompts",
    "prompts_without_pairs",
    "tied_prompts",
    "candidates",
    "dropped_candidates",
    "eligible_pairs",
)


def sum_statistics(parts: Sequence[Statistics], plans: Sequence[ShardPlan]) -> Statistics:
    """Counts of what went in are added; those of shards are of the ``plans``, a tier each, with
    what the sets had left out before.
    """
    dropped = [plan.dropped for plan in plans]
    for part in parts:
        for index, number in enumerate(part.dropped_remainder_by_tier[: len(dropped)]):
            dropped[index] += number
    imported: Counter[str] = Counter()
    for part in parts:
        imported.update(part.imported or {})
    return Statistics(
        **{name: sum(getattr(part, name) for part in parts) for name in _ADDED},
        pairs_by_tier=tuple(plan.num_shards * plan.count for plan in plans),
        dropped_remainder_by_tier=tuple(dropped),
        imported=dict(imported) or None,
    )
