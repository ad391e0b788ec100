"""Section of a recipe: how well a run does on prompts it does not train on, while it trains."""

from __future__ import annotations

from .reward import Reward
from .section import NonNegativeInt, PositiveInt, Sampler, Section


class Evaluate(Section):
    """Images of `prompts.validation` from the policy, held against the base's from the same noise
    as the run goes on: which step is best, and when to stop.
    """

    every: NonNegativeInt = 0
    """Optimiser steps between evaluations, the last step among them; 0 turns them off. The dry run
    says what one costs."""
    prompts: PositiveInt = 32
    """How many of the validation prompts are drawn: the first ones."""
    images: PositiveInt = 4
    """Images a prompt from each model."""
    sampler: Sampler | None = None
    """Sampling of these images; null: that of `compare`."""
    scorers: tuple[Reward, ...] = ()
    """Who scores, each with all keys of `reward`: the first chooses the best step, the others are
    shown beside it. Empty: the recipe's reward. They stay on the device beside the training. One
    that is also `compare.judge` judges no more what it has chosen: the report says so."""
    stop: NonNegativeInt = 0
    """End the run after so many evaluations in a row whose score is clearly below the best one's
    (the 95 % interval of the difference is below zero), and export the best; 0 never does."""
