"""Human preference score v2.1: cosine of a CLIP ViT-H/14 trained on people's rankings.

Wu et al., "Human preference score v2", arXiv 2306.09341. The published file is an open_clip
checkpoint; its cosines are scores without a temperature. Images are prepared as there: the longer
side fitted to 224 pixels, black bars beside what is not square.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from ..models.pretrained import reading
from ..recipe.reward import HpsSpec
from .clip import ClipModel, read_tokenizer
from .open_clip_weights import clip_of_open_clip
from .tensor_files import read_tensors

HEADS = 16  # of ViT-H/14, in both towers: the one size that tensors do not tell


class Hps:
    """HPS v2 or v2.1, by which of the two files `path` is."""

    def __init__(self, spec: HpsSpec, device: torch.device) -> None:
        tokenizer = read_tokenizer(
            f"reward.tokenizer={spec.tokenizer}", "CLIP tokenizer", spec.tokenizer
        )
        with reading(f"reward at {spec.path}", "HPS checkpoint"):
            model = clip_of_open_clip(read_tensors(spec.path), HEADS, tokenizer.eos_token_id)
            if len(tokenizer) != model.config.text_config.vocab_size:
                raise ValueError(
                    f"it has {model.config.text_config.vocab_size} tokens, and the tokenizer "
                    f"{spec.tokenizer} {len(tokenizer)}"
                )
        self.size = model.config.vision_config.image_size
        square = {"height": self.size, "width": self.size}
        processor = CLIPImageProcessorPil(size=square, crop_size=square)
        self.clip = ClipModel(model, tokenizer, processor, device, spec.precision)

    @cached_property
    def fingerprint(self) -> str:
        # Not the weights' alone: a clip_score of them sees other pixels.
        return hashlib.sha256(f"hps {self.clip.fingerprint}".encode()).hexdigest()

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return self.clip.cosines([self._fitted(i) for i in images], prompts).cpu().numpy()

    def _fitted(self, image: Image.Image) -> Image.Image:
        return fitted_whole(image.convert("RGB"), self.size)


def fitted_whole(image: Image.Image, size: int) -> Image.Image:
    """An RGB image of ``size`` squared that shows all of ``image``, in the middle of black."""
    scale = size / max(image.size)
    width, height = (round(side * scale) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC) if scale != 1 else image
    canvas = Image.new("RGB", (size, size))
    canvas.paste(resized, ((size - width) // 2, (size - height) // 2))
    return canvas
