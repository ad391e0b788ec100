"""Section of a recipe: how often candidates are drawn anew from the tuned model."""

from __future__ import annotations

from typing import Literal

from .section import PositiveInt, Section


class Rounds(Section):
    """Candidates, pairs and training again and again, each time from what the rounds before have
    made of the model. `cdpo rounds` alone reads this.
    """

    count: PositiveInt = 2
    """Rounds that are tried: each is a `prepare` and a `train`. A round is kept if it gains on
    `prompts.validation` by the first of `evaluate.scorers`; the next one begins where the last that
    was kept ended, with other noise."""
    reference: Literal["previous", "base"] = "previous"
    """What a round's loss holds the policy against. `previous`: the model that the round begins
    from, on which it trains a new adapter. `base`: the recipe's own model in all rounds, on which
    each goes on with the adapter of the last that was kept; the result is that one adapter."""
