"""Which images `prepare` samples and how they are ranked: one file for each sampled source."""

from __future__ import annotations

from ...display.terminal import Terminal
from ...ranks import Ranks
from ...recipe import Recipe
from .masked import MaskedRanker
from .protocol import Ranker
from .reward import RewardRanker

__all__ = ["Ranker", "make_ranker"]


def make_ranker(recipe: Recipe, ranks: Ranks, terminal: Terminal) -> Ranker:
    """The ranker of a recipe whose `prepare.source` is sampled."""
    if recipe.prepare.source.type == "masked":
        return MaskedRanker(recipe)
    return RewardRanker(recipe, ranks, terminal)
