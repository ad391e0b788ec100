"""Charts of what a score alone hides: how far a run has gone, and what that cost in variety."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .figures import COLORS, Format, render
from .report_data import Diversity, PromptSet, ScorerResult
from .stats import Estimate
from .wording import outcome

_OUTCOMES = {"better": "winner", "worse": "loser", "unclear": "muted"}
_DASHED = (0, (4, 3))
_HEIGHTS = (-12, 5, -22, 15)  # of names above their points, in font points
_LONGEST = 22  # characters of a name: more would leave no room for the chart


def drift_chart(
    prompt_set: PromptSet, result: ScorerResult, base_name: str, fmt: Format = "svg"
) -> bytes:
    """A scorer's difference from base over the KL proxy, a point a run; base is at 0, 0.

    The axis of the KL proxy is that of its root, which is a distance (as in Gao et al., arXiv
    2210.10760, figure 1).
    """
    return render(partial(_draw_drift, prompt_set, result, base_name), (3.8, 2.6), fmt)


def diversity_chart(diversity: Diversity, fmt: Format = "svg") -> bytes:
    """A bar a model, base first, with its interval; a dashed line where base is."""
    height = 0.75 + 0.3 * len(diversity.estimates)
    return render(partial(_draw_diversity, diversity), (3.8, height), fmt)


def _draw_drift(
    prompt_set: PromptSet, result: ScorerResult, base_name: str, figure: Figure
) -> None:
    axes = figure.subplots()
    runs = {
        name: (prompt_set.divergence[name], summary.difference)
        for name, summary in result.summaries.items()
        if name in prompt_set.divergence
    }
    axes.axhline(0, color=COLORS["muted"], linewidth=0.9, linestyle=_DASHED)
    points = [(base_name, 0.0, 0.0, "ink")]
    for name, (drift, change) in runs.items():
        color = _OUTCOMES[outcome(change)]
        _draw_point(axes, drift, change, COLORS[color])
        points.append((name, drift.mean, change.mean, color))
    axes.plot([0], [0], "o", color=COLORS["ink"], markersize=5, clip_on=False, zorder=3)
    _name_points(axes, points)
    axes.set_xscale("function", functions=(_root, np.square))
    reach = [b for drift, _ in runs.values() for b in (drift.mean, drift.high) if math.isfinite(b)]
    axes.set_xlim(0, 1.3 * max(reach, default=0.0) or 1.0)
    axes.margins(y=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.tick_params(length=0)
    axes.set_xlabel("KL proxy (root scale)")
    axes.set_ylabel(f"{_short(result.scorer)}, minus base", parse_math=False)


def _root(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(values, 0))


def _draw_point(axes: Axes, x: Estimate, y: Estimate, color: str) -> None:
    axes.errorbar(
        [x.mean],
        [y.mean],
        xerr=_reach(x),
        yerr=_reach(y),
        fmt="o",
        color=color,
        markersize=5,
        elinewidth=1.2,
    )


def _reach(estimate: Estimate) -> list[list[float]] | None:
    """How far the interval goes below and above the mean; None if there is none."""
    if not math.isfinite(estimate.low):
        return None
    below, above = estimate.mean - estimate.low, estimate.high - estimate.mean
    return [[max(0.0, below)], [max(0.0, above)]]


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Names beside the points, at heights that take turns, so that neighbours do not collide."""
    known = [point for point in points if math.isfinite(point[1]) and math.isfinite(point[2])]
    for index, (name, x, y, color) in enumerate(sorted(known, key=lambda point: point[1])):
        axes.annotate(
            _short(name),
            (x, y),
            xytext=(6, _HEIGHTS[index % len(_HEIGHTS)]),
            textcoords="offset points",
            fontsize=8,
            color=COLORS[color],
            parse_math=False,
        )


def _draw_diversity(diversity: Diversity, figure: Figure) -> None:
    axes = figure.subplots()
    names = list(diversity.estimates)
    estimates = [diversity.estimates[name] for name in names]
    places = range(len(names))
    colors = [COLORS["muted"], *[COLORS["accent"]] * (len(names) - 1)]
    axes.barh(places, [e.mean for e in estimates], height=0.62, color=colors, alpha=0.55)
    for place, estimate in zip(places, estimates, strict=True):
        axes.errorbar(
            [estimate.mean], [place], xerr=_reach(estimate), color=COLORS["ink"], elinewidth=1.2
        )
    axes.axvline(estimates[0].mean, color=COLORS["muted"], linewidth=0.9, linestyle=_DASHED)
    axes.set_yticks(places, [_short(name) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.set_xlabel("mean cosine distance of a prompt's images")


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
