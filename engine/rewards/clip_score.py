"""CLIP score: cosine between the embeddings of an image and of its prompt.

Any `CLIPModel` in transformers' folder format (Radford et al., arXiv 2103.00020; as a score of
text-to-image models: Hessel et al., CLIPScore, arXiv 2104.08718, here without its factor 2.5 and
its clipping at zero, neither of which changes a ranking that is not degenerate).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..recipe import ClipScoreSpec
from .clip_model import ClipModel, read_clip


class ClipScore:
    """A CLIP model; the embeddings of the latest prompts are kept."""

    def __init__(self, spec: ClipScoreSpec, device: torch.device) -> None:
        parts = read_clip(f"reward at {spec.path}", "CLIP model", spec.path, spec.revision)
        self.clip = ClipModel(*parts, device, spec.precision)
        self.fingerprint = self.clip.fingerprint

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return self.clip.cosines(images, prompts).cpu().numpy()
