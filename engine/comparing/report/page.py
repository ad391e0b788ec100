"""report.html: one self-contained page, with no script and nothing fetched.

All text goes through jinja2's autoescape, and a content security policy forbids scripts and any
load but data URIs, so a prompt can be anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ...basics.estimates import Estimate
from ...basics.files import replacing
from . import wording
from .content import PromptSample, PromptSet, ReportData, WorstLoss
from .curves import spans, tier_timeline, training_panels
from .figures import Embedded, embed
from .findings import findings
from .methods import (
    drift_panels,
    method_tables,
    round_panels,
    runs_table,
    shared_seed_grids,
    win_tables,
)

_TEMPLATES = Path(__file__).parent / "templates"
_PIXEL_ART_BELOW = 128


def write_report(path: Path | str, data: ReportData) -> None:
    """Write the page, under its name only when complete."""
    html = render_report(data)
    with replacing(path, error=None) as file:
        file.write(html.encode())


def render_report(data: ReportData) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    return environment.get_template("report.html.j2").render(
        data=data,
        verdict=wording.verdict(data),
        second=wording.second_sentences(data),
        findings=findings(data),
        tiles=_tiles(data),
        table=[] if data.is_of_several else _table(data),
        methods=method_tables(data) if data.is_of_several else [],
        wins=win_tables(data),
        by_round=round_panels(data),
        drifts=drift_panels(data),
        grids=shared_seed_grids(data),
        runs=runs_table(data),
        compared=" and ".join(filter(None, (", ".join(data.run_names[:-1]), data.run_names[-1]))),
        sets=[_sample_set(prompt_set) for prompt_set in data.prompt_sets if prompt_set.samples],
        worst=[_worst(loss) for loss in sorted(data.worst, key=_change)],
        worst_sets={loss.prompt_set for loss in data.worst},
        panels=_panels(data),
        both_rose=any(run.both_errors_rose for run in data.runs),
        timeline=_timeline(data),
        progression=_progression(data),
        pixelated=_is_pixelated(data),
    )


def _unbroken(sentence: str) -> str:
    """Keep a number and its interval on one line."""
    return re.sub(r"(\S+) (\[\S+,) (\S+\])", "\\1\u00a0\\2\u00a0\\3", sentence)


def _tiles(data: ReportData) -> list[dict[str, str]]:
    """The big numbers: difference and win rate of the first scorer of each prompt set, of the run
    that it puts first.
    """
    tiles = []
    for prompt_set in data.prompt_sets:
        for result in prompt_set.scorers[:1]:
            best = wording.best_run(prompt_set)
            summary = result.summaries[best]
            difference, wins = summary.difference, summary.win_rate
            decimals = wording.decimals_for(difference)
            whose = f"{best}: " if data.is_of_several else ""
            tiles.append(
                {
                    "value": wording.signed(difference.mean, decimals),
                    "range": wording.bounds(difference, decimals),
                    "label": f"{whose}{result.scorer}, {prompt_set.name} prompts",
                    "outcome": wording.outcome(difference),
                }
            )
            label = f"{whose}win rate, {prompt_set.name} prompts"
            tiles.append({"label": label, **wording.share_of_wins(wins)})
    return tiles


def _table(data: ReportData) -> list[dict[str, Any]]:
    rows = []
    for prompt_set in data.prompt_sets:
        for index, result in enumerate(prompt_set.scorers):
            difference = result.summary.difference
            decimals = wording.decimals_for(difference)
            rows.append(
                {
                    "set": prompt_set.name,
                    "span": 0 if index else len(prompt_set.scorers),
                    "scorer": result.scorer,
                    "base": wording.number(result.summary.base.mean),
                    "tuned": wording.number(result.summary.tuned.mean),
                    "mean": wording.signed(difference.mean, decimals),
                    "range": wording.bounds(difference, decimals),
                    "outcome": wording.outcome(difference),
                    "bar": _bar(difference, _extent(data, result.scorer)),
                    "wins": wording.percent_interval(result.summary.win_rate),
                    "size": wording.sample_size(result),
                    "dropped": result.summary.num_dropped,
                }
            )
    return rows


def _extent(data: ReportData, scorer: str) -> tuple[float, float]:
    """The range that the bars of one scorer share; zero is always in it."""
    differences = [
        result.summary.difference
        for prompt_set in data.prompt_sets
        for result in prompt_set.scorers
        if result.scorer == scorer
    ]
    bounds = [0.0] + [b for d in differences for b in (d.low, d.mean, d.high) if math.isfinite(b)]
    margin = 0.06 * (max(bounds) - min(bounds)) or 1.0
    return min(bounds) - margin, max(bounds) + margin


def _bar(difference: Estimate, extent: tuple[float, float]) -> dict[str, float] | None:
    """Where an interval, its mean and zero lie in a table cell, in percent of the cell's width."""
    if not math.isfinite(difference.mean):
        return None
    low, high = difference.low, difference.high
    if not math.isfinite(low):
        low = high = difference.mean
    start, end = extent

    def place(value: float) -> float:
        return round(100 * (value - start) / (end - start), 2)

    return {
        "low": place(low),
        "width": round(place(high) - place(low), 2),
        "mean": place(difference.mean),
        "zero": place(0.0),
    }


def _sample_set(prompt_set: PromptSet) -> dict[str, Any]:
    return {
        "name": prompt_set.name,
        "total": len(prompt_set.prompts),
        "samples": [_sample(sample) for sample in prompt_set.samples],
    }


def _sample(sample: PromptSample) -> dict[str, Any]:
    base, tuned = (
        [
            {"image": embed(image), "score": _score(scores, index)}
            for index, image in enumerate(images)
        ]
        for images, scores in (
            (sample.base, sample.base_scores),
            (sample.tuned, sample.tuned_scores),
        )
    )
    pairs = zip(sample.base_scores, sample.tuned_scores, strict=False)
    gains = [tuned_score - base_score for base_score, tuned_score in pairs]
    gains = [gain for gain in gains if math.isfinite(gain)]
    gain = sum(gains) / len(gains) if gains else None
    columns = max(1, math.ceil(math.sqrt(max(len(base), len(tuned)))))
    return {
        "prompt": sample.prompt,
        "base": base,
        "tuned": tuned,
        "columns": columns,
        "gain": None if gain is None else wording.signed(gain, 3),
        "rose": gain is not None and gain > 0,
    }


def _score(scores: Sequence[float], index: int) -> str:
    return wording.number(scores[index], 3) if index < len(scores) else ""


def _change(loss: WorstLoss) -> float:
    return loss.tuned_score - loss.base_score


def _worst(loss: WorstLoss) -> dict[str, Any]:
    return {
        "prompt": loss.prompt,
        "set": loss.prompt_set,
        "run": loss.run,
        "base": embed(loss.base),
        "tuned": embed(loss.tuned),
        "base_score": wording.number(loss.base_score, 3),
        "tuned_score": wording.number(loss.tuned_score, 3),
        "loss": wording.signed(_change(loss), 3),
    }


def _panels(data: ReportData) -> list[dict[str, Any]]:
    return [
        {"title": panel.title, "note": panel.note, "svg": svg}
        for panel, svg in training_panels(data.metrics, data.evaluations)
    ]


def _timeline(data: ReportData) -> Markup | None:
    has_tiers = spans(data.metrics, "tiers")
    return tier_timeline(data.metrics, data.num_tiers) if has_tiers else None


def _progression(data: ReportData) -> Embedded | None:
    if data.progression is None:
        return None
    return embed(data.progression, largest=None, lossless=_is_pixelated(data))


def _is_pixelated(data: ReportData) -> bool:
    """Images so small are shown with hard pixels."""
    images = [i for s in data.prompt_sets for p in s.samples for i in (*p.base, *p.tuned)]
    images += [i for s in data.prompt_sets for row in s.rows for i in row.images.values()]
    images += [image for loss in data.worst for image in (loss.base, loss.tuned)]
    return bool(images) and max(max(image.size) for image in images) < _PIXEL_ART_BELOW
