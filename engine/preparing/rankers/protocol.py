"""What `prepare` asks of a ranker: the images of a prompt, and the pairs they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from ...curriculum.labelled import PairsMade
from ...rewards import Identity
from ...shards.manifest import RewardSource
from ..candidates import Start
from ..parts import Parts


class Ranker(Protocol):
    """Decides which images are sampled for a prompt and which of them beats which."""

    count: int
    """Images sampled for each prompt."""
    made_by: Mapping[str, Any]
    """What else than the usual settings of a sampler the images are a function of."""

    def describe(self) -> tuple[str, str]:
        """Images of a prompt, and what ranks them, for the head of the terminal."""

    def inputs(self) -> dict[str, Any]:
        """Its choices that the shards are a function of; the keys are part of their hash."""

    def source(self) -> RewardSource:
        """What the manifest says of it, with a hash of the weights that it holds now."""

    def reward(self) -> Identity | None:
        """What the reward that ranks is by content, loaded only if that is not known; None where
        none does.
        """

    def starts(self, prompt: str) -> list[Start]:
        """What each of a prompt's images starts from."""

    def rank(self, parts: Parts) -> tuple[np.ndarray, PairsMade]:
        """Scores (N, K) float32 of all prompts' images, and their pairs; the same on every rank."""

    def shown(self, scores: np.ndarray, pairs: np.ndarray) -> list[int]:
        """Images for the contact sheet, of a prompt that has these ``pairs``."""
