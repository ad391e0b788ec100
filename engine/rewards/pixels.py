"""Rewards without weights, of the pixels alone: size as JPEG, or minus that, and colourfulness.

JPEG: Black et al., "Training diffusion models with reinforcement learning", arXiv 2305.13301: kB
(1000 bytes) at quality 95. The bytes depend on the JPEG library, whose version is in the
fingerprint.

Colourfulness: Hasler and Süsstrunk, Measuring colourfulness in natural images, 2003. With
rg = R - G and yb = (R + G) / 2 - B over the pixels of an 8-bit image::

    sqrt(std(rg)^2 + std(yb)^2) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)

0 is gray; people call 33 moderately and 82 highly colourful.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, features

from ..recipe.reward import ColorfulnessSpec, JpegIncompressibilitySpec, JpegSpec

QUALITY = 95


class JpegSize:
    """Needs no weights; the prompt does not count."""

    def __init__(self, spec: JpegSpec | JpegIncompressibilitySpec, device: torch.device) -> None:
        del device
        self.sign = 1.0 if spec.type == "jpeg_incompressibility" else -1.0
        library = features.version("libjpeg_turbo") or features.version("jpg")
        made_by = f"{spec.type} 1, libjpeg {library}"
        self.fingerprint = hashlib.sha256(made_by.encode()).hexdigest()

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return np.asarray([self.sign * kilobytes(image) for image in images], np.float64)


def kilobytes(image: Image.Image) -> float:
    """Of the image as JPEG."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


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
