"""The report's parts that set models side by side, as its template takes them."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from . import wording
from .embed import embed
from .method_charts import diversity_chart, drift_chart
from .report_data import PromptSet, ReportData, ScorerResult
from .stats import Estimate

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
    shifted = Estimate(estimate.mean - 0.5, estimate.low - 0.5, estimate.high - 0.5)
    share, _, interval = wording.percent_interval(estimate).partition(" [")
    heat = 2 * HEAT * abs(shifted.mean) if math.isfinite(shifted.mean) else 0
    return {
        "share": share,
        "range": f"[{interval}" if interval else "",
        "side": "above" if shifted.mean > 0 else "below",
        "heat": f"{100 * heat:.0f}%",
        "outcome": wording.outcome(shifted),
    }


def drift_panels(data: ReportData) -> list[dict[str, Any]]:
    """Charts of reward against KL proxy, a scorer each, and of diversity, for each prompt set."""
    panels = []
    for prompt_set in data.prompt_sets:
        on = f"{prompt_set.name} prompts"
        for result in prompt_set.scorers if prompt_set.divergence else ():
            svg = drift_chart(prompt_set, result, data.base_name)
            panels.append(_panel(f"{result.scorer} against KL proxy", on, svg))
        if prompt_set.diversity is not None:
            panels.append(_panel("Diversity", on, diversity_chart(prompt_set.diversity)))
    return panels


def _panel(title: str, note: str, svg: bytes) -> dict[str, Any]:
    # Our own drawing: matplotlib escapes the names that stand in it.
    return {"title": title, "note": note, "svg": Markup(svg.decode())}


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
