"""Numbers and the verdict in words: one place, so terminal, report and results.json agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from ...basics.estimates import Estimate
from .content import PromptSet, ReportData, ScorerResult

Outcome = Literal["better", "worse", "unclear"]

TABLE_COLUMNS = ("prompts", "scorer", "base", "tuned", "difference [95%]", "win rate [95%]")


def outcome(difference: Estimate) -> Outcome:
    """What the interval allows to say; an interval that contains zero is `unclear`."""
    if difference.low > 0:
        return "better"
    return "worse" if difference.high < 0 else "unclear"


def decimals_for(estimate: Estimate) -> int:
    """Decimals that suit the interval's width, and never round a bound that is not zero to zero."""
    width = (estimate.high - estimate.low) / 2
    decimals = 4
    if math.isfinite(width) and width > 0:
        decimals = min(6, max(2, -math.floor(math.log10(width / 3))))
    for bound in (estimate.low, estimate.high):
        while decimals < 6 and math.isfinite(bound) and bound and not round(bound, decimals):
            decimals += 1
    return decimals


def signed(value: float, decimals: int) -> str:
    """``+0.031`` or ``−0.012``, with a real minus sign."""
    return f"{value:+.{decimals}f}".replace("-", "−") if math.isfinite(value) else "n/a"


def number(value: float, decimals: int = 4) -> str:
    """``0.312``; ``n/a`` for NaN."""
    return f"{value:.{decimals}f}".replace("-", "−") if math.isfinite(value) else "n/a"


def signed_interval(estimate: Estimate) -> str:
    """``+0.031 [+0.022, +0.040]``."""
    decimals = decimals_for(estimate)
    return f"{signed(estimate.mean, decimals)} {bounds(estimate, decimals)}"


def bounds(estimate: Estimate, decimals: int) -> str:
    """``[+0.022, +0.040]``, or that there is no interval."""
    if not math.isfinite(estimate.low):
        return "[no interval]"
    return f"[{signed(estimate.low, decimals)}, {signed(estimate.high, decimals)}]"


def percent_interval(estimate: Estimate) -> str:
    """``63.2% [58.0, 68.1]``."""
    if not math.isfinite(estimate.mean):
        return "n/a"
    if not math.isfinite(estimate.low):
        return f"{100 * estimate.mean:.1f}% [no interval]"
    return f"{100 * estimate.mean:.1f}% [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def share_of_wins(win_rate: Estimate) -> dict[str, str]:
    """Its parts for a page: value, range, and what the interval says against one half."""
    value, _, interval = percent_interval(win_rate).partition(" [")
    shifted = Estimate(win_rate.mean - 0.5, win_rate.low - 0.5, win_rate.high - 0.5)
    return {
        "value": value,
        "range": f"[{interval}" if interval else "",
        "outcome": outcome(shifted),
    }


def sample_size(result: ScorerResult) -> str:
    """``60 × 4``: prompts and images a prompt, and how many pairs had no score; of several runs the
    most that any lacks.
    """
    num_prompts, num_images = result.base_scores.shape
    text = f"{num_prompts} × {num_images}"
    dropped = max(summary.num_dropped for summary in result.summaries.values())
    return f"{text} (−{dropped})" if dropped else text


def verdict(data: ReportData) -> str:
    """One sentence on the first prompt set and scorer, no stronger than the interval allows."""
    if not data.prompt_sets or not data.prompt_sets[0].scorers:
        return "Nothing was scored."
    return _sentence(data.prompt_sets[0], data.prompt_sets[0].scorers[0], data)


def second_sentences(data: ReportData) -> list[str]:
    """The same for the other prompt sets."""
    return [
        _sentence(prompt_set, prompt_set.scorers[0], data)
        for prompt_set in data.prompt_sets[1:]
        if prompt_set.scorers
    ]


def table_columns(data: ReportData) -> Sequence[str]:
    """Heads of the table for the terminal."""
    if not data.is_of_several:
        return TABLE_COLUMNS
    scorers = [result.scorer for result in data.prompt_sets[0].scorers]
    return ("prompts", "method", *scorers, "diversity", "KL proxy")


def summary_rows(data: ReportData) -> list[Sequence[str]]:
    """The table for the terminal: a row a scorer (80 columns hold it), or, of several runs, a row a
    method with its differences from base; columns are :func:`table_columns`.
    """
    if data.is_of_several:
        return [row for prompt_set in data.prompt_sets for row in _method_rows(prompt_set, data)]
    return [
        (
            prompt_set.name,
            result.scorer,
            number(result.summary.base.mean),
            number(result.summary.tuned.mean),
            signed_interval(result.summary.difference),
            percent_interval(result.summary.win_rate),
        )
        for prompt_set in data.prompt_sets
        for result in prompt_set.scorers
    ]


def _method_rows(prompt_set: PromptSet, data: ReportData) -> list[Sequence[str]]:
    base = [number(s.base.mean) for s in prompt_set.scorers]
    sides = {data.base_name: base} | {
        run: [signed_interval(s.summaries[run].difference) for s in prompt_set.scorers]
        for run in data.run_names
    }
    return [
        (prompt_set.name, side, *cells, diversity_of(prompt_set, side), drift_of(prompt_set, side))
        for side, cells in sides.items()
    ]


def diversity_of(prompt_set: PromptSet, side: str) -> str:
    """``0.312``: the mean distance of a prompt's images; a dash if it was not measured."""
    diversity = prompt_set.diversity
    return "–" if diversity is None else number(diversity.estimates[side].mean, 3)


def drift_of(prompt_set: PromptSet, side: str) -> str:
    """``0.0123``: the KL proxy of a run to three digits; a dash for base, and if not measured."""
    found = prompt_set.divergence.get(side)
    return "–" if found is None else digits(found.mean)


def digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}".replace("-", "−") if math.isfinite(value) else "n/a"


def best_run(prompt_set: PromptSet) -> str:
    """The run whose mean difference from base is highest in the eyes of the first scorer."""
    summaries = prompt_set.scorers[0].summaries

    def height(run: str) -> float:
        mean = summaries[run].difference.mean
        return mean if math.isfinite(mean) else -math.inf

    return max(summaries, key=height)


def _sentence(prompt_set: PromptSet, result: ScorerResult, data: ReportData) -> str:
    if data.is_of_several:
        return _sentence_on_several(prompt_set, result, data)
    difference = result.summary.difference
    where = f"on {prompt_set.name} prompts"
    who = "The judge" if result.scorer == "judge" else f"The {result.scorer} it was trained on"
    numbers = signed_interval(difference)
    if not math.isfinite(difference.mean):
        return f"{who} could not score any image pair {where}."
    if not math.isfinite(difference.low):
        return f"{who} has too few prompts {where.removeprefix('on ')} for an interval: {numbers}."
    if outcome(difference) == "unclear":
        return (
            f"{who} finds no clear difference between {data.base_name} and {data.tuned_name} "
            f"{where}: {numbers}; the interval contains zero."
        )
    preferred = data.tuned_name if outcome(difference) == "better" else data.base_name
    return f"{who} prefers the {preferred} model {where}: {numbers}."


def _sentence_on_several(prompt_set: PromptSet, result: ScorerResult, data: ReportData) -> str:
    """The run in front, and how many of them are better than base."""
    best = best_run(prompt_set)
    difference = result.summaries[best].difference
    where = f"on {prompt_set.name} prompts"
    who = f"The {result.scorer}"
    if not math.isfinite(difference.mean):
        return f"{who} could not score any image pair {where}."
    outcomes = [outcome(summary.difference) for summary in result.summaries.values()]
    if "better" not in outcomes:
        return (
            f"{who} finds none of {len(outcomes)} runs clearly better than {data.base_name} "
            f"{where}; {best} comes first: {signed_interval(difference)}."
        )
    return (
        f"{who} puts {best} first {where}: {signed_interval(difference)} against "
        f"{data.base_name}; clearly better than {data.base_name}: {outcomes.count('better')} of "
        f"{len(outcomes)} runs."
    )
