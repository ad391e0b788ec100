"""Training curves and the tier timeline, from rows of metrics.jsonl, which become arrays that are
sorted, filled with NaN, smoothed and thinned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from .figures import COLORS, render

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


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else float("nan")


@dataclass(frozen=True)
class Line:
    """A curve of a panel: the metric, its colour, its name in the legend."""

    metric: str
    color: str
    label: str = ""
    minus: str = ""
    """A metric to subtract."""


@dataclass(frozen=True)
class Panel:
    """One small chart; ``level`` is a dashed line that means something, such as log 2."""

    title: str
    lines: tuple[Line, ...]
    level: float | None = None
    level_name: str = ""
    note: str = ""


PANELS = (
    Panel("Loss", (Line("loss", "accent"),), math.log(2), "log 2", "log 2 is chance"),
    Panel("Implicit accuracy", (Line("accuracy", "accent"),), 0.5, "chance"),
    Panel("Margin", (Line("margin", "accent"),), 0.0, "", "the logit: above 0 is right"),
    Panel(
        "Error minus reference",
        (Line("winner_error", "winner", "winner"), Line("loser_error", "loser", "loser")),
        0.0,
        "",
        "below 0 is better than the reference",
    ),
    Panel(
        "Loser minus winner error by timestep",
        tuple(
            Line(f"loser_error_q{q}", f"q{q}", name, f"winner_error_q{q}")
            for q, name in enumerate(("least noise", "2nd quarter", "3rd quarter", "most"), 1)
        ),
        0.0,
        "",
        "by quartile of the timestep, relative to the reference",
    ),
    Panel("Gradient norm", (Line("grad_norm", "accent"),)),
)
EVALUATION_PANELS = (
    Panel(
        "Score on validation prompts",
        (Line("gain", "accent", "mean"), Line("low", "muted", "95 %"), Line("high", "muted")),
        0.0,
        "base",
        "minus the base's from the same noise",
    ),
    Panel("KL proxy on validation prompts", (Line("divergence", "accent"),), 0.0, "base"),
)


def training_panels(
    metrics: Sequence[Row], evaluations: Sequence[Row] = ()
) -> list[tuple[Panel, Markup]]:
    """Each panel that has data as a figure of its own, so that a page can lay them out."""
    found = []
    for panels, rows in ((PANELS, metrics), (EVALUATION_PANELS, evaluations)):
        in_order = sorted_rows(rows)
        found += [(panel, in_order) for panel in panels if _has_data(in_order, panel)]
    return [(panel, render(partial(_draw_panel, rows, panel), (3.8, 2.2))) for panel, rows in found]


def tier_timeline(metrics: Sequence[Row], num_tiers: int | None = None) -> Markup:
    """Which tiers are in use at every step: a bar a tier, the easiest at the bottom."""
    rows = sorted_rows(metrics)
    intervals = tier_intervals(rows)
    count = max([num_tiers or 1, *intervals])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for tier, used in intervals.items():
            # One hue, so that light and dark themes both work; harder is stronger.
            strength = 0.3 + 0.7 * (tier - 1) / max(1, count - 1)
            bars = [(start, end - start) for start, end in used]
            axes.broken_barh(bars, (tier - 0.36, 0.72), color=COLORS["accent"], alpha=strength)
        labels = {1: "1 easiest", count: f"{count} hardest"} if count > 1 else {}
        axes.set_yticks(range(1, count + 1), [labels.get(t, str(t)) for t in range(1, count + 1)])
        axes.set_ylim(0.4, count + 0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params(length=0)
        if rows:
            axes.set_xlim(float(rows[0]["step"]), float(rows[-1]["step"]) + 1)
        axes.set_xlabel("optimiser step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))

    return render(draw, (9.6, 0.9 + 0.3 * count))


def _has_data(rows: Sequence[Row], panel: Panel) -> bool:
    return any(np.isfinite(column(rows, line.metric)).any() for line in panel.lines)


def _draw_panel(rows: Sequence[Row], panel: Panel, figure: Figure) -> None:
    axes, steps = figure.subplots(), column(rows, "step")
    for index, span in enumerate(spans(rows, "stage")):
        if index % 2:
            axes.axvspan(span.start, span.end, color=COLORS["shade"], linewidth=0, zorder=0)
    if panel.level is not None:
        axes.axhline(panel.level, color=COLORS["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
    for line in panel.lines:
        values = column(rows, line.metric)
        if line.minus:
            values = values - column(rows, line.minus)
        color, marker = COLORS[line.color], "o" if np.isfinite(values).sum() == 1 else ""
        if len(panel.lines) <= 2:  # behind four curves the single steps would be a thicket
            axes.plot(*thinned(steps, values), color=color, linewidth=0.7, alpha=0.3)
        axes.plot(
            *thinned(steps, smoothed(values)),
            color=color,
            linewidth=1.7,
            marker=marker,
            markersize=4,
            label=line.label or None,
        )
    if len(rows) > 1:
        axes.set_xlim(steps[0], steps[-1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.tick_params(length=0)
    if panel.level is not None and panel.level_name:
        axes.annotate(
            panel.level_name,
            (1, panel.level),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 2),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=COLORS["muted"],
        )
    if any(line.label for line in panel.lines):
        axes.legend(loc="best", ncols=2, handlelength=1.2, columnspacing=1.0)
