"""What ranks images. A reward is any object with this shape; higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image


class RewardModel(Protocol):
    """Scores images against the prompts they were made from."""

    fingerprint: str
    """Content hash of the weights: goes into the manifest with the scores."""

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """float32 (N,), one an image; NaN where no score can be given, never a made-up one."""
        ...
