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
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...basics.keyed import Permutation, Stream, content_id
from ...curriculum.labelled import PairsMade
from ...curriculum.pairs import PAIR
from ...recipe import Masked, Recipe
from ...shards.manifest import RewardSource
from ..candidates import Start, whole_prompts
from ..parts import Parts


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

    def reward(self) -> None:
        return None

    def starts(self, prompt: str) -> list[Start]:
        return whole_prompts(self.num_winners) + [
            self._loser(winner, share)
            for tier, share in enumerate(self.spec.fractions, start=1)
            for winner in self._winners(prompt, tier)
        ]

    def rank(self, parts: Parts) -> tuple[np.ndarray, PairsMade]:
        count = len(parts.starts) - 1
        shares = np.repeat(np.asarray(self.spec.fractions, np.float32), self.pairs_per_tier)
        scores = np.concatenate([np.zeros(self.num_winners, np.float32), -shares])
        rows = [row for record in range(count) for row in self._pairs(record, parts)]
        eligible = count * self.num_winners * len(self.spec.fractions)
        made = PairsMade(np.array(rows, PAIR), eligible)
        return np.tile(scores, (count, 1)), made

    def shown(self, scores: np.ndarray, pairs: np.ndarray) -> list[int]:
        """The winner that is in most tiers, and its losers."""
        of_pairs: np.ndarray = pairs["winner"]  # typed: mypy takes 5 s to find out
        winners, tiers = np.unique(of_pairs, return_counts=True)
        winner = winners[tiers.argmax()]
        return [int(winner), *pairs["loser"][of_pairs == winner].tolist()]

    def _winners(self, prompt: str, tier: int) -> list[int]:
        """The winners that are paired in a tier. A larger budget keeps those of a smaller one."""
        shuffle = Permutation(
            self.num_winners, self.seed, Stream.PAIR_BUDGET, content_id(prompt), tier
        )
        return sorted(shuffle.at(np.arange(self.pairs_per_tier)).tolist())

    def _loser(self, winner: int, share: float) -> Start:
        own = f"{winner} masked {share!r}"
        return Start(str(winner) if self.spec.same_noise else own, share, mask=str(winner))

    def _pairs(self, record: int, parts: Parts) -> Iterator[tuple[Any, ...]]:
        """Rows of :data:`PAIR`, by tier, then winner."""
        prompt, first = parts.caption(record), record * self.count
        loser = first + self.num_winners
        for tier, share in enumerate(self.spec.fractions, start=1):
            for winner in self._winners(prompt, tier):
                name = content_id(prompt, str(winner), f"masked {share!r}")
                ranks = (1, 2 + len(self.spec.fractions) - tier)
                yield name, tier, first + winner, loser, ranks, (0.0, -share)
                loser += 1
