"""CLIP score: cosine between the embeddings of an image and of its prompt.

Any `CLIPModel` in transformers' folder format (Radford et al., arXiv 2103.00020; as a score of
text-to-image models: Hessel et al., CLIPScore, arXiv 2104.08718, here without its factor 2.5 and
its clipping at zero, neither of which changes a ranking that is not degenerate).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from ..backbones import fingerprint
from ..backbones.pretrained import reading
from ..recipe import Reward

PROMPTS_KEPT = 4096  # an imported data set may have a million captions


class ClipScore:
    """A CLIP model in float32; the embeddings of the latest prompts are kept."""

    def __init__(self, spec: Reward, device: torch.device) -> None:
        with reading(f"reward at {spec.path}", "CLIP model"):
            self.model, report = CLIPModel.from_pretrained(
                spec.path, dtype=torch.float32, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(spec.path)
            self.processor = CLIPImageProcessorPil.from_pretrained(spec.path)
            # transformers makes up what it does not find: random weights, an empty tokenizer.
            if report["missing_keys"]:
                raise ValueError(f"its weights lack {min(report['missing_keys'])}")
            if len(self.tokenizer) <= len(set(self.tokenizer.all_special_ids)):
                raise ValueError("it has no vocabulary")
        self.model.requires_grad_(False).eval().to(device)
        self.device = device
        self.batch_size = spec.batch_size
        self.fingerprint = fingerprint(self.model)
        self._embed_text = lru_cache(maxsize=PROMPTS_KEPT)(self._embed_text_anew)

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        scores = [
            self._score_batch(
                images[start : start + self.batch_size], prompts[start : start + self.batch_size]
            )
            for start in range(0, len(images), self.batch_size)
        ]
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def _score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        vision = self.model.vision_model(pixel_values=pixels)
        image_embeds = F.normalize(self.model.visual_projection(vision.pooler_output), dim=-1)
        text_embeds = torch.stack([self._embed_text(prompt) for prompt in prompts])
        return (image_embeds * text_embeds).sum(-1).float().cpu().numpy()

    def _embed_text_anew(self, prompt: str) -> torch.Tensor:
        tokens = self.tokenizer(
            [prompt],
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        text = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
        return F.normalize(self.model.text_projection(text.pooler_output), dim=-1)[0]
