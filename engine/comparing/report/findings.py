"""What in a comparison should make a reader distrust a good score, in plain words.

============== ==================================================================================
collapse       the images of a prompt have become alike: diversity fell by more than a fifth, and
               the interval of the change excludes zero
reward hacking the reward that was trained on rose while the judge fell, both beyond their intervals
unlearning     training ended with the errors of winners and of losers above the reference's
============== ==================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ...basics.estimates import Estimate
from .content import PromptSet, ReportData, ScorerResult

LOST = 0.2  # share of base's diversity

Kind = Literal["collapse", "reward hacking", "unlearning"]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with one run."""

    kind: Kind
    run: str
    prompt_set: str | None
    text: str
    """One sentence."""


def findings(data: ReportData) -> list[Finding]:
    """All of them, by prompt set and run."""
    found = [
        finding
        for prompt_set in data.prompt_sets
        for run in data.run_names
        for finding in (*_collapse(prompt_set, run), *_reward_hacking(prompt_set, run))
    ]
    found += [
        Finding(
            "unlearning",
            run.name,
            None,
            f"{run.name}: training ended with the errors of winners and of losers above the "
            "reference's; it moved away from both, as the trainer warns of while it happens.",
        )
        for run in data.runs
        if run.both_errors_rose
    ]
    return found


def _collapse(prompt_set: PromptSet, run: str) -> Iterator[Finding]:
    diversity = prompt_set.diversity
    if diversity is None:
        return
    lost = diversity.share_lost(run)
    if lost > LOST and diversity.changes[run].high < 0:
        yield Finding(
            "collapse",
            run,
            prompt_set.name,
            f"{run}: the images of a prompt have become alike; on {prompt_set.name} prompts their "
            f"mean distance is {100 * lost:.0f} % below base's, the sign of a collapse.",
        )


def _reward_hacking(prompt_set: PromptSet, run: str) -> Iterator[Finding]:
    reward, judge = (_difference(prompt_set, name, run) for name in ("reward", "judge"))
    if reward is not None and judge is not None and reward.low > 0 and judge.high < 0:
        yield Finding(
            "reward hacking",
            run,
            prompt_set.name,
            f"{run}: on {prompt_set.name} prompts the reward rose while the judge, which training "
            "never saw, fell: the sign of reward hacking.",
        )


def _difference(prompt_set: PromptSet, scorer: str, run: str) -> Estimate | None:
    found: list[ScorerResult] = [s for s in prompt_set.scorers if s.scorer == scorer]
    return found[0].summaries[run].difference if found else None
