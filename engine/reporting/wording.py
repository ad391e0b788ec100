"""Numbers and the verdict in words: one place, so terminal, report and results.json agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from .report_data import PromptSet, ReportData, ScorerResult
from .stats import Estimate

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


def sample_size(result: ScorerResult) -> str:
    """``60 × 4``: prompts and images a prompt, and how many pairs had no score."""
    num_prompts, num_images = result.base_scores.shape
    text = f"{num_prompts} × {num_images}"
    return f"{text} (−{result.summary.num_dropped})" if result.summary.num_dropped else text


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


def summary_rows(data: ReportData) -> list[Sequence[str]]:
    """The table for the terminal (80 columns hold it); columns are `TABLE_COLUMNS`."""
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


def _sentence(prompt_set: PromptSet, result: ScorerResult, data: ReportData) -> str:
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
