"""Ranking without a reward, by how much of the prompt a candidate was told: Curriculum-DPO++.

For each prompt M winners are sampled from the whole prompt, and losers with a share of its
embedding set to zero: 0.9 of it, which is easy to tell from the winner, down to 0.1, which is hard.
Tier k pairs up to `pairs_per_prompt_per_tier` winners, drawn by key, with a loser each of share
number k. A winner's losers are masked nestedly, so difficulty rises with every tier by construction
(:mod:`cdpo.engine.models.masking`). Losers that no pair would take are not sampled.

Candidates 0..M-1 of a prompt are its winners, then come the losers of tier 1, of tier 2 and so on.
A candidate's score is minus the share of its prompt that was zero; rank 1 are the winners, then
come the losers from the smallest share to the largest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...basics.keyed import Permutation, Stream, content_id
from ...curriculum.pairs import Pair, PromptPairs
from ...recipe import Masked, Recipe
from ...shards.manifest import RewardSource
from ..candidates import CandidateSet, Start, whole_prompts
from .protocol import RankedPrompt


class MaskedRanker:
    """`prepare.source` of type `masked`."""

    def __init__(self, recipe: Recipe) -> None:
        assert isinstance(recipe.prepare.source, Masked)
        self.spec = recipe.prepare.source
        self.seed = recipe.seed
        self.num_winners = recipe.prepare.candidates_per_prompt
        budget = recipe.curriculum.pairs_per_prompt_per_tier
        self.pairs_per_tier = min(self.num_winners, budget)
        self.count = self.num_winners + len(self.spec.fractions) * self.pairs_per_tier
        self.made_by: Mapping[str, Any] = {
            "masked": {
                **self.spec.model_dump(mode="json"),
                "winners": self.num_winners,
                "pairs_per_tier": self.pairs_per_tier,
            }
        }

    def describe(self) -> tuple[str, str]:
        shares = ", ".join(f"{share:g}" for share in self.spec.fractions)
        images = f"({self.num_winners} winners + {self.count - self.num_winners} losers)"
        return images, f"masked prompts: losers with {shares} of the embedding zero"

    def inputs(self) -> dict[str, Any]:
        return {"source": self.spec.model_dump(mode="json")}

    def source(self) -> RewardSource:
        chosen = json.dumps(self.inputs(), sort_keys=True).encode()
        return RewardSource(
            type="masked", path="prompts", fingerprint=hashlib.sha256(chosen).hexdigest()
        )

    def starts(self, prompt: str) -> list[Start]:
        return whole_prompts(self.num_winners) + [
            self._loser(winner, share)
            for tier, share in enumerate(self.spec.fractions, start=1)
            for winner in self._winners(prompt, tier)
        ]

    def rank(self, images: CandidateSet, prompts: Sequence[str]) -> dict[str, RankedPrompt]:
        shares = np.repeat(np.asarray(self.spec.fractions, np.float32), self.pairs_per_tier)
        scores = np.concatenate([np.zeros(self.num_winners, np.float32), -shares])
        eligible = self.num_winners * len(self.spec.fractions)
        ranked = {}
        for prompt in prompts:
            pairs = self._pairs(prompt)
            outcome = PromptPairs(
                pairs, dropped_candidates=0, all_tied=False, num_eligible=eligible
            )
            ranked[prompt] = RankedPrompt(outcome, scores, _ladder(pairs))
        return ranked

    def _winners(self, prompt: str, tier: int) -> list[int]:
        """The winners that are paired in a tier. A larger budget keeps those of a smaller one."""
        shuffle = Permutation(
            self.num_winners, self.seed, Stream.PAIR_BUDGET, content_id(prompt), tier
        )
        return sorted(shuffle.at(np.arange(self.pairs_per_tier)).tolist())

    def _loser(self, winner: int, share: float) -> Start:
        own = f"{winner} masked {share!r}"
        return Start(str(winner) if self.spec.same_noise else own, share, mask=str(winner))

    def _pairs(self, prompt: str) -> list[Pair]:
        """By tier, then winner."""
        hardest_first = sorted(self.spec.fractions)
        pairs, loser = [], self.num_winners
        for tier, share in enumerate(self.spec.fractions, start=1):
            for winner in self._winners(prompt, tier):
                pairs.append(
                    Pair(
                        pair_id=content_id(prompt, str(winner), f"masked {share!r}"),
                        prompt=prompt,
                        tier=tier,
                        winner=winner,
                        loser=loser,
                        winner_rank=1,
                        loser_rank=2 + hardest_first.index(share),
                        winner_score=0.0,
                        loser_score=-share,
                    )
                )
                loser += 1
        return pairs


def _ladder(pairs: Sequence[Pair]) -> list[int]:
    """The winner that is in most tiers, and its losers, from the smallest share to the largest."""
    losers: dict[int, list[int]] = {}
    for pair in reversed(pairs):
        losers.setdefault(pair.winner, []).append(pair.loser)
    winner = max(sorted(losers), key=lambda number: len(losers[number]))
    return [winner, *losers[winner]]
