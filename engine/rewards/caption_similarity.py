"""Text alignment as in the papers: a model says what it sees, another compares with the prompt.

The captioner is asked a question where its processor has a chat template (LLaVA, as in the papers,
Qwen2-VL, SmolVLM and the like), and describes the image unasked where it has none (BLIP, GIT). It
decodes greedily, so an image has one caption. The score is the cosine of caption and prompt in a
sentence-transformers model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..models import DTYPES, fingerprint
from ..models.pretrained import reading
from ..recipe.reward import CaptionSimilaritySpec
from .sentence_model import SentenceModel


class CaptionSimilarity:
    """A captioner in the recipe's precision, and a sentence model in float32."""

    def __init__(self, spec: CaptionSimilaritySpec, device: torch.device) -> None:
        self.sentences = SentenceModel(spec.sentence_model, device)
        with reading(f"reward at {spec.path}", "image-to-text model", spec.path) as place:
            self.model, report = AutoModelForImageTextToText.from_pretrained(
                place,
                revision=spec.revision,
                dtype=DTYPES[spec.precision],
                output_loading_info=True,
            )
            if report["missing_keys"]:
                raise ValueError(f"its weights lack {min(report['missing_keys'])}")
            self.processor = AutoProcessor.from_pretrained(place, revision=spec.revision)
            self.asked = self._asked(spec.question)
        self.model.requires_grad_(False).eval().to(device)
        self.device = device
        self.max_new_tokens = spec.max_new_tokens

    @cached_property
    def fingerprint(self) -> str:
        both = fingerprint(self.model) + self.sentences.fingerprint
        return hashlib.sha256(both.encode()).hexdigest()

    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        captions = self.sentences.embed(self.captions(images))
        wanted = torch.stack([self.sentences.embed_kept(prompt) for prompt in prompts])
        cosines: np.ndarray = (captions * wanted).sum(-1).cpu().numpy()
        return cosines

    @torch.no_grad()
    def captions(self, images: Sequence[Image.Image]) -> list[str]:
        """What the model sees, an image each."""
        inputs = self._inputs([image.convert("RGB") for image in images])
        given = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
        tokens = self.model.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=self.max_new_tokens
        )
        texts = self.processor.batch_decode(tokens[:, given:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _asked(self, question: str) -> str | None:
        """The text that goes with every image; None for a model that takes none."""
        if not getattr(self.processor, "chat_template", None):
            return None
        self.processor.tokenizer.padding_side = "left"  # what is generated follows on the right
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return text

    def _inputs(self, images: list[Image.Image]) -> dict[str, Any]:
        if self.asked is None:
            inputs = self.processor(images=images, return_tensors="pt")
        else:
            inputs = self.processor(
                images=[[image] for image in images],
                text=[self.asked] * len(images),
                padding=True,
                return_tensors="pt",
            )
        return dict(inputs.to(self.device, dtype=self.model.dtype))  # of what is no integer
