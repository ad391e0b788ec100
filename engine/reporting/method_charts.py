"""Charts of what a score alone hides: how far a run has gone, and what that cost in variety."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .figures import COLORS, Format, render
from .report_data import Diversity, PromptSet, ScorerResult
from .stats import Estimate
from .wording import outcome

_OUTCOMES = {"better": "winner", "worse": "loser", "unclear": "muted"}
_DASHED = (0, (4, 3))
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h", "d")
_LONGEST = 22  # characters of a name: more would leave no room for the chart
_NAMES_A_LINE = 2  # beneath a chart


def drift_chart(
    prompt_set: PromptSet, result: ScorerResult, base_name: str, fmt: Format = "svg"
) -> bytes:
    """A scorer's difference from base over the KL proxy, a point a run; base is at 0, 0.

    The axis of the KL proxy is that of its root, which is a distance (as in Gao et al., arXiv
    2210.10760, figure 1).
    """
    num_lines = math.ceil((1 + len(result.summaries)) / _NAMES_A_LINE)
    size = (3.8, 2.5 + 0.2 * num_lines)
    return render(partial(_draw_drift, prompt_set, result, base_name), size, fmt)


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
    axes.plot([0], [0], "o", color=COLORS["ink"], markersize=5, clip_on=False, zorder=3)
    names = [(base_name, "o", COLORS["ink"])]
    for (name, (drift, change)), marker in zip(runs.items(), itertools.cycle(_MARKERS)):
        color = COLORS[_OUTCOMES[outcome(change)]]
        _draw_point(axes, drift, change, marker, color)
        names.append((name, marker, color))
    _list_names(figure, names)
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


def _draw_point(axes: Axes, x: Estimate, y: Estimate, marker: str, color: str) -> None:
    axes.errorbar(
        [x.mean],
        [y.mean],
        xerr=_reach(x),
        yerr=_reach(y),
        fmt=marker,
        color=color,
        markersize=6,
        markeredgecolor=COLORS["rule"],
        markeredgewidth=0.5,
        elinewidth=0.9,
    )


def _reach(estimate: Estimate) -> list[list[float]] | None:
    """How far the interval goes below and above the mean; None if there is none."""
    if not math.isfinite(estimate.low):
        return None
    below, above = estimate.mean - estimate.low, estimate.high - estimate.mean
    return [[max(0.0, below)], [max(0.0, above)]]


def _list_names(figure: Figure, names: Sequence[tuple[str, str, str]]) -> None:
    """Names with their markers beneath the chart: runs of one base lie close together, and one that
    went far pushes them closer, so that names beside the points would cover each other.
    """
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=color, markersize=6)
        for _, marker, color in names
    ]
    legend = figure.legend(
        handles,
        [_short(name) for name, _, _ in names],
        loc="outside lower left",
        ncols=_NAMES_A_LINE,
        handletextpad=0.2,
        borderpad=0,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


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
    axes.set_xlabel("cosine distance within a prompt")


def _short(name: str) -> str:
    """Names of runs begin alike and differ at their ends: what is too long goes from the middle."""
    if len(name) <= _LONGEST:
        return name
    kept = _LONGEST // 2
    return f"{name[: kept - 1]}…{name[-kept:]}"
