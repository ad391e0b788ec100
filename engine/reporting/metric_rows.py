"""Rows of metrics.jsonl as arrays fit for drawing: sorted, filled with NaN, smoothed, thinned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, Any]

_MAX_POINTS = 300


def sorted_rows(metrics: Sequence[Row]) -> list[Row]:
    """Rows in order of step; of a step logged twice (before and after a resume) the later one."""
    by_step = {int(row["step"]): row for row in metrics if row.get("step") is not None}
    return [by_step[step] for step in sorted(by_step)]


def column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    """One metric; NaN where it is missing, None or infinite."""
    values = np.asarray([_number(row.get(name)) for row in rows], np.float64)
    values[~np.isfinite(values)] = np.nan
    return values


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential mean over about a 25th of the run, unbiased at the start, blind to NaN."""
    decay = 1 - 1 / max(1.0, len(values) / 25)
    total = weight = 0.0
    result = np.full(len(values), np.nan)
    for index, value in enumerate(values):
        if np.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        if weight:
            result[index] = total / weight
    return result


def thinned(
    steps: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """At most 300 points, each the mean of its neighbourhood, so that 10,000 steps stay a small
    file.
    """
    if len(steps) <= _MAX_POINTS:
        return steps, values
    edges = np.linspace(0, len(steps), _MAX_POINTS + 1).astype(int)
    finite = np.isfinite(values)
    counts = np.add.reduceat(finite, edges[:-1])
    sums = np.add.reduceat(np.where(finite, values, 0.0), edges[:-1])
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return np.add.reduceat(steps, edges[:-1]) / np.diff(edges), means


@dataclass(frozen=True)
class Span:
    """Steps start..end (end excluded) during which something held."""

    value: Any
    start: float
    end: float


def spans(rows: Sequence[Row], name: str) -> list[Span]:
    """Runs of equal values of ``name``; a list counts as a value. Rows without it are skipped."""
    known = [row for row in rows if row.get(name) is not None]
    if not known:
        return []
    groups = [list(group) for _, group in groupby(known, key=lambda row: row[name])]
    starts = [float(group[0]["step"]) for group in groups]
    ends = [*starts[1:], float(known[-1]["step"]) + 1]
    return [
        Span(group[0][name], start, end)
        for group, start, end in zip(groups, starts, ends, strict=True)
    ]


def tier_intervals(rows: Sequence[Row]) -> dict[int, list[tuple[float, float]]]:
    """For each tier, the step intervals during which it was in use, adjoining ones joined."""
    found: dict[int, list[tuple[float, float]]] = {}
    for span in spans(rows, "tiers"):
        for tier in span.value:
            intervals = found.setdefault(int(tier), [])
            if intervals and intervals[-1][1] == span.start:
                intervals[-1] = (intervals[-1][0], span.end)
            else:
                intervals.append((span.start, span.end))
    return found


def both_errors_rose(metrics: Sequence[Row]) -> bool:
    """Whether the policy ended up worse than the reference on winners and losers alike."""
    rows = sorted_rows(metrics)
    if not rows:
        return False
    winner, loser = (smoothed(column(rows, f"{side}_error"))[-1] for side in ("winner", "loser"))
    return bool(winner > 0 and loser > 0)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")
