"""Colourfulness of an image (Hasler and Süsstrunk, Measuring colourfulness in natural images,
2003).

With rg = R - G and yb = (R + G) / 2 - B over the pixels of an 8-bit image::

    sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)

0 is gray; people call 33 moderately and 82 highly colourful.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..recipe import ColorfulnessSpec


class Colorfulness:
    """Needs no weights; the prompt does not count."""

    fingerprint = hashlib.sha256(b"colorfulness 1").hexdigest()

    def __init__(self, spec: ColorfulnessSpec, device: torch.device) -> None:
        del spec, device

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return np.asarray([colorfulness(image) for image in images], np.float64)


def colorfulness(image: Image.Image) -> float:
    """The measure above, in float64."""
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.float64), -1, 0)
    red_green, yellow_blue = red - green, (red + green) / 2 - blue
    spread = np.hypot(red_green.std(), yellow_blue.std())
    return float(spread + 0.3 * np.hypot(red_green.mean(), yellow_blue.mean()))
