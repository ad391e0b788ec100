"""PickScore, and any preference model of the CLIP family: temperature times cosine.

Kirstain et al., "Pick-a-Pic", arXiv 2305.01569: a CLIP ViT-H/14 trained on people's choices between
two images of a prompt. Its published weights are a `CLIPModel` in transformers' folder format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..recipe import PickScoreSpec
from .clip_model import ClipModel, read_clip


class PickScore:
    """exp(logit_scale) x cosine, as published."""

    def __init__(self, spec: PickScoreSpec, device: torch.device) -> None:
        what = f"reward at {spec.path}"
        parts = read_clip(what, "CLIP model", spec.path, spec.revision, spec.processor)
        self.clip = ClipModel(*parts, device, spec.precision)
        # Not the weights' alone: a clip_score of the same folder has other scores.
        own = f"pick_score {self.clip.fingerprint}"
        self.fingerprint = hashlib.sha256(own.encode()).hexdigest()

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        scale = self.clip.model.logit_scale.exp()
        scores: np.ndarray = (scale * self.clip.cosines(images, prompts)).cpu().numpy()
        return scores
