"""The report's parts that set models side by side, as its template takes them, with the charts of
what a score alone hides: how far a run has gone, and what that cost in variety.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ...basics.estimates import Estimate
from . import wording
from .content import Diversity, PromptSet, ReportData, ScorerResult
from .figures import COLORS, embed, render
from .wording import outcome

_OUTCOMES = {"better": "winner", "worse": "loser", "unclear": "muted"}
_DASHED = (0, (4, 3))
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">", "p", "*", "h", "d")
_LONGEST = 22  # characters of a name: more would leave no room for the chart
_NAMES_A_LINE = 2  # beneath a chart


def drift_chart(prompt_set: PromptSet, result: ScorerResult, base_name: str) -> Markup:
    """A scorer's difference from base over the KL proxy, a point a run; base is at 0, 0.

    The axis of the KL proxy is that of its root, which is a distance (as in Gao et al., arXiv
    2210.10760, figure 1).
    """
    num_lines = math.ceil((1 + len(result.summaries)) / _NAMES_A_LINE)
    size = (3.8, 2.5 + 0.2 * num_lines)
    return render(partial(_draw_drift, prompt_set, result, base_name), size)


def rounds_chart(result: ScorerResult, ends: Mapping[str, int]) -> Markup:
    """A scorer's difference from base after each round, base being round 0; ``ends`` are the
    numbers of the last rounds of runs.
    """
    return render(partial(_draw_rounds, result, ends), (3.8, 2.5))


def diversity_chart(diversity: Diversity) -> Markup:
    """A bar a model, base first, with its interval; a dashed line where base is."""
    height = 0.75 + 0.3 * len(diversity.estimates)
    return render(partial(_draw_diversity, diversity), (3.8, height))


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


def _draw_rounds(result: ScorerResult, ends: Mapping[str, int], figure: Figure) -> None:
    axes = figure.subplots()
    changes = {ends[name]: result.summaries[name].difference for name in ends}
    rounds = sorted(changes)
    means = [changes[number].mean for number in rounds]
    axes.axhline(0, color=COLORS["muted"], linewidth=0.9, linestyle=_DASHED)
    axes.plot([0, *rounds], [0, *means], color=COLORS["accent"], linewidth=1.2)
    axes.plot([0], [0], "o", color=COLORS["ink"], markersize=5, zorder=3)
    for number in rounds:
        change, color = changes[number], COLORS[_OUTCOMES[outcome(changes[number])]]
        axes.errorbar(
            [number], [change.mean], yerr=_reach(change), fmt="o", color=color, markersize=5
        )
    axes.set_xlim(-0.3, rounds[-1] + 0.3)
    axes.margins(y=0.18)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.tick_params(length=0)
    axes.set_xlabel("round")
    axes.set_ylabel(f"{_short(result.scorer)}, minus base", parse_math=False)


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


HEAT = 0.55  # how much of the colour a win rate of 0 or 1 gets


def method_tables(data: ReportData) -> list[dict[str, Any]]:
    """For each prompt set a row a model, base first, and a cell a scorer."""
    return [
        {
            "name": prompt_set.name,
            "scorers": [result.scorer for result in prompt_set.scorers],
            "has_diversity": prompt_set.diversity is not None,
            "has_divergence": bool(prompt_set.divergence),
            "size": wording.sample_size(prompt_set.scorers[0]),
            "rows": [_base_row(prompt_set, data)]
            + [_method_row(prompt_set, run) for run in data.run_names],
        }
        for prompt_set in data.prompt_sets
        if prompt_set.scorers
    ]


def _base_row(prompt_set: PromptSet, data: ReportData) -> dict[str, Any]:
    return {
        "name": data.base_name,
        "cells": [
            {"mean": wording.number(result.base.mean), "change": "", "range": "", "outcome": ""}
            for result in prompt_set.scorers
        ],
        "diversity": wording.diversity_of(prompt_set, data.base_name),
        "diversity_outcome": "",
        "drift": "0",
    }


def _method_row(prompt_set: PromptSet, run: str) -> dict[str, Any]:
    lost = prompt_set.diversity is not None and prompt_set.diversity.changes[run].high < 0
    return {
        "name": run,
        "cells": [_cell(result, run) for result in prompt_set.scorers],
        "diversity": wording.diversity_of(prompt_set, run),
        "diversity_outcome": "worse" if lost else "",
        "drift": wording.drift_of(prompt_set, run),
    }


def _cell(result: ScorerResult, run: str) -> dict[str, str]:
    summary = result.summaries[run]
    decimals = wording.decimals_for(summary.difference)
    return {
        "mean": wording.number(summary.tuned.mean),
        "change": wording.signed(summary.difference.mean, decimals),
        "range": wording.bounds(summary.difference, decimals),
        "outcome": wording.outcome(summary.difference),
    }


def win_tables(data: ReportData) -> list[dict[str, Any]]:
    """For each prompt set and scorer the matrix of win rates; none where one run is compared."""
    if not data.is_of_several:
        return []
    return [
        {
            "title": f"{result.scorer}, {prompt_set.name} prompts",
            "models": [data.base_name, *result.scores],
            "rows": [
                [None if i == j else _win(cell) for j, cell in enumerate(row)]
                for i, row in enumerate(result.win_rates)
            ],
        }
        for prompt_set in data.prompt_sets
        for result in prompt_set.scorers
    ]


def _win(estimate: Estimate) -> dict[str, Any]:
    heat = 2 * HEAT * abs(estimate.mean - 0.5) if math.isfinite(estimate.mean) else 0
    side = "above" if estimate.mean > 0.5 else "below"
    return {"side": side, "heat": f"{100 * heat:.0f}%", **wording.share_of_wins(estimate)}


def drift_panels(data: ReportData) -> list[dict[str, Any]]:
    """Charts of reward against KL proxy, a scorer each, and of diversity, for each prompt set."""
    panels = []
    for prompt_set in data.prompt_sets:
        on = f"{prompt_set.name} prompts"
        for result in prompt_set.scorers if prompt_set.divergence else ():
            svg = drift_chart(prompt_set, result, data.base_name)
            title = f"{result.scorer} against KL proxy"
            panels.append({"title": title, "note": on, "svg": svg})
        if prompt_set.diversity is not None:
            svg = diversity_chart(prompt_set.diversity)
            panels.append({"title": "Diversity", "note": on, "svg": svg})
    return panels


def round_panels(data: ReportData) -> list[dict[str, Any]]:
    """Charts of the gain by round, for each prompt set and scorer; none unless there are several
    runs that are sums of rounds.
    """
    ends = {run.name: run.rounds[-1] for run in data.runs if run.rounds}
    if len(ends) < 2:
        return []
    return [
        {
            "title": f"{result.scorer}: gain by round",
            "note": f"{prompt_set.name} prompts",
            "svg": rounds_chart(result, ends),
        }
        for prompt_set in data.prompt_sets
        for result in prompt_set.scorers
    ]


def shared_seed_grids(data: ReportData) -> list[dict[str, Any]]:
    """For each prompt set a row a prompt and a column a model."""
    return [
        {
            "name": prompt_set.name,
            "total": len(prompt_set.prompts),
            "models": [data.base_name, *data.run_names],
            "rows": [
                {
                    "prompt": row.prompt,
                    "cells": [
                        {"image": embed(image), "name": name, "score": _score(row.scores, name)}
                        for name, image in row.images.items()
                    ],
                }
                for row in prompt_set.rows
            ],
        }
        for prompt_set in data.prompt_sets
        if prompt_set.rows
    ]


def _score(scores: Any, name: str) -> str:
    return wording.number(scores[name], 3) if name in scores else ""


def runs_table(data: ReportData) -> dict[str, Any] | None:
    """What made each run; None where one run is compared, whose recipe the report shows whole."""
    if not data.is_of_several or not data.runs:
        return None
    keys = list(dict.fromkeys(key for run in data.runs for key in run.method))
    return {
        "keys": keys,
        "rows": [
            {
                "name": run.name,
                "folder": run.run_dir,
                "values": [_value(run.method.get(key)) for key in keys],
            }
            for run in data.runs
        ],
    }


def _value(value: str | int | float | None) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "–" if value is None else str(value)
