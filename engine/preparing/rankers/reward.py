"""Ranking by a reward: candidates of the whole prompt, scored, and paired by their gap."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...curriculum.labelled import PairsMade, ranked_pairs
from ...display.terminal import Terminal
from ...ranks import Ranks
from ...recipe import Recipe
from ...rewards import Identity, RewardModel, known_identity, load_reward
from ...shards.manifest import RewardSource
from ...sources.pictures import Tolerance
from ..candidates import Start, whole_prompts
from ..parts import Parts
from ..scores import Scoring


class RewardRanker:
    """`prepare.source` of type `generate`."""

    def __init__(self, recipe: Recipe, ranks: Ranks, terminal: Terminal) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.terminal = terminal
        self.count = recipe.prepare.candidates_per_prompt
        self.made_by: Mapping[str, Any] = {}

    def describe(self) -> tuple[str, str]:
        return f"{self.count} candidates", self.recipe.reward.label

    def inputs(self) -> dict[str, Any]:
        return {"reward": self.recipe.reward.identity()}

    def source(self) -> RewardSource:
        spec, weights = self.recipe.reward, self._reward.identity["weights"]
        return RewardSource(type=spec.type, path=spec.source, fingerprint=weights)

    def reward(self) -> Identity:
        known = None if "_reward" in vars(self) else known_identity(self.recipe.reward)
        return known or self._reward.identity

    def starts(self, prompt: str) -> list[Start]:
        return whole_prompts(self.count)

    def rank(self, parts: Parts) -> tuple[np.ndarray, PairsMade]:
        recipe, each = self.recipe, parts.each
        source = f"{self._reward.fingerprint[:16]}:{parts.content[:16]}"
        scoring = Scoring(Path(recipe.run_dir), source, parts, self.ranks)
        calls = recipe.reward.images_per_call
        scores = scoring.run(self._reward, calls, Tolerance(0), self.terminal)
        made = ranked_pairs(
            np.repeat(parts.captions, each),
            scores.reshape(-1),
            lambda image: parts.caption(image // each),
            recipe.curriculum,
            recipe.seed,
            most=each,
        )
        return scores, made

    def shown(self, scores: np.ndarray, pairs: np.ndarray) -> list[int]:
        """All that have a score."""
        record, each = int(pairs["winner"][0]) // scores.shape[1], scores.shape[1]
        return [record * each + int(place) for place in np.flatnonzero(np.isfinite(scores[record]))]

    @cached_property
    def _reward(self) -> RewardModel:
        cache = Path(self.recipe.run_dir) / "score_cache"
        return load_reward(self.recipe.reward, self.ranks.device, cache)
