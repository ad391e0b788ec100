"""What ranks images. A reward is any object with the first shape; higher is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image

Identity = Mapping[str, str]
"""`weights`: hash of the weights, or of the code where there are none, and of the knobs, which sets
of any age have in their manifests; `whole`: of tokenizers, processors and configs as well.
"""


class RewardModel(Protocol):
    """Scores images against the prompts they were made from."""

    identity: Identity
    """What it is by content."""
    fingerprint: str
    """Content hash of all that the scores depend on: scores are kept under it."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """float32 (N,), one an image; NaN where no score can be given, never a made-up one."""
        ...


class Scorer(Protocol):
    """What the file of one reward implements: a batch of images that fits into memory.

    Batches, what is done about failures, and the cache are :mod:`.scored_call`'s.
    """

    fingerprint: str
    """Content hash of the weights, or of the code where there are none; a `cached_property` where
    it takes long. Tokenizers, processors and configs that the object holds are added to it.
    """

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """(N,) of any floating type. Whatever it raises counts against the images it was given."""
        ...
