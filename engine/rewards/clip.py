"""CLIP models as rewards use them, and the two scores that are made of their cosine.

CLIP score: the cosine between the embeddings of an image and of its prompt. Any `CLIPModel` in
transformers' folder format (Radford et al., arXiv 2103.00020; as a score of text-to-image models:
Hessel et al., CLIPScore, arXiv 2104.08718, here without its factor 2.5 and its clipping at zero,
neither of which changes a ranking that is not degenerate).

PickScore, and any preference model of the CLIP family: temperature times cosine. Kirstain et al.,
"Pick-a-Pic", arXiv 2305.01569: a CLIP ViT-H/14 trained on people's choices between two images of a
prompt. Its published weights are a `CLIPModel` in transformers' folder format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from ..models import DTYPES, fingerprint
from ..models.pretrained import reading
from ..recipe.reward import ClipScoreSpec, ModelReward, PickScoreSpec

PROMPTS_KEPT = 4096  # an imported data set may have a million captions


def read_tokenizer(
    what: str, kind: str, path: str, revision: str | None = None, subfolder: str = ""
) -> Any:
    """A tokenizer with a vocabulary. OutsideError, "``what`` is no ``kind``: reason"."""
    with reading(what, kind, path) as place:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, subfolder=subfolder)
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
            raise ValueError("it has no vocabulary")
    return tokenizer


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision of a forward; weights stay float32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


class ClipModel:
    """A frozen CLIP on one device; the embeddings of the latest prompts are kept."""

    def __init__(
        self, model: CLIPModel, tokenizer: Any, processor: Any, device: torch.device, precision: str
    ) -> None:
        self.model = model.requires_grad_(False).eval().to(device)
        self.tokenizer = tokenizer
        self.processor = processor
        self.device = device
        self.precision = precision
        self._embed_text = lru_cache(maxsize=PROMPTS_KEPT)(self._embed_text_anew)

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint(self.model)

    @torch.no_grad()
    def cosines(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> torch.Tensor:
        """float32 (N,), of each image with its prompt."""
        text = torch.stack([self._embed_text(prompt) for prompt in prompts])
        return (self.embed_images(images) * text).sum(-1).float()

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """float32 (N, width), of length 1."""
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        with computing_in(self.precision, self.device):
            vision = self.model.vision_model(pixel_values=pixels)
            projected = self.model.visual_projection(vision.pooler_output)
        return F.normalize(projected.float(), dim=-1)

    def _embed_text_anew(self, prompt: str) -> torch.Tensor:
        tokens = self.tokenizer(
            [prompt],
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        with computing_in(self.precision, self.device):
            text = self.model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            projected = self.model.text_projection(text.pooler_output)
        return F.normalize(projected.float(), dim=-1)[0]


def read_clip(spec: ModelReward, device: torch.device, processor: str | None = None) -> ClipModel:
    """The CLIP of a section; ``processor`` is where tokenizer and image processor are if not beside
    the weights. OutsideError, "reward at PATH is no CLIP model: reason", where one of them is
    missing or damaged.
    """
    what, kind = f"reward at {spec.path}", "CLIP model"
    beside, of = (processor, None) if processor else (spec.path, spec.revision)
    with reading(what, kind, spec.path) as place:
        model, report = CLIPModel.from_pretrained(
            place, revision=spec.revision, dtype=torch.float32, output_loading_info=True
        )
        # transformers makes up what it does not find: random weights, an empty tokenizer.
        if report["missing_keys"]:
            raise ValueError(f"its weights lack {min(report['missing_keys'])}")
    with reading(what, kind, beside) as place:
        images = CLIPImageProcessorPil.from_pretrained(place, revision=of)
    tokenizer = read_tokenizer(what, kind, beside, of)
    return ClipModel(model, tokenizer, images, device, spec.precision)


class ClipScore:
    """A CLIP model; the embeddings of the latest prompts are kept."""

    def __init__(self, spec: ClipScoreSpec, device: torch.device) -> None:
        self.clip = read_clip(spec, device)

    @cached_property
    def fingerprint(self) -> str:
        return self.clip.fingerprint

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        return self.clip.cosines(images, prompts).cpu().numpy()


class PickScore:
    """exp(logit_scale) x cosine, as published."""

    def __init__(self, spec: PickScoreSpec, device: torch.device) -> None:
        self.clip = read_clip(spec, device, spec.processor)

    @cached_property
    def fingerprint(self) -> str:
        # Not the weights' alone: a clip_score of the same folder has other scores.
        own = f"pick_score {self.clip.fingerprint}"
        return hashlib.sha256(own.encode()).hexdigest()

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        scale = self.clip.model.logit_scale.exp()
        scores: np.ndarray = (scale * self.clip.cosines(images, prompts)).cpu().numpy()
        return scores
