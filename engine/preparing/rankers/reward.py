"""Ranking by a reward: candidates of the whole prompt, scored, and paired by their gap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ...basics.failpoints import failpoint
from ...curriculum.pairs import form_pairs
from ...display.terminal import Terminal
from ...ranks import Ranks
from ...recipe import Recipe
from ...rewards import RewardModel, load_reward
from ...shards.manifest import RewardSource
from ..candidates import CandidateSet, Start, whole_prompts
from ..scores import Scoring
from .protocol import RankedPrompt


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
        spec = self.recipe.reward
        return RewardSource(type=spec.type, path=spec.source, fingerprint=self._reward.fingerprint)

    def starts(self, prompt: str) -> list[Start]:
        return whole_prompts(self.count)

    def rank(self, images: CandidateSet, prompts: Sequence[str]) -> dict[str, RankedPrompt]:
        source = f"{self._reward.fingerprint[:16]}:{images.fingerprint[:16]}"
        scoring = Scoring(Path(self.recipe.run_dir), source, self.ranks)
        scores = scoring.run(self._reward, images, prompts, self.terminal)
        failpoint("prepare.scored")
        return {prompt: self._ranked(prompt, scores[prompt]) for prompt in prompts}

    @cached_property
    def _reward(self) -> RewardModel:
        cache = Path(self.recipe.run_dir) / "score_cache"
        return load_reward(self.recipe.reward, self.ranks.device, cache)

    def _ranked(self, prompt: str, scores: np.ndarray) -> RankedPrompt:
        outcome = form_pairs(prompt, scores, self.recipe.curriculum, self.recipe.seed)
        order = [int(i) for i in np.argsort(-scores, kind="stable") if np.isfinite(scores[i])]
        return RankedPrompt(outcome, scores, order)
