"""ImageReward v1.0: a BLIP that reads the prompt while looking at the image, and rates the two.

Xu et al., "ImageReward", arXiv 2304.05977. Their package wants a transformers of 2023 and is not
imported. The published file holds BLIP's vision transformer, its text encoder with cross-attention
and five linear layers, all of which transformers has under other names. The rating of the first
text token, less its mean and over its deviation on their data, is the score.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel, CLIPImageProcessorPil
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ..models import fingerprint
from ..models.pretrained import reading
from ..recipe.reward import ImageRewardSpec
from .aesthetic import LAYERS, linear_layers
from .clip import computing_in, read_tokenizer
from .tensor_files import count_blocks, filled, read_tensors, take

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of ratings, as published
TOKENS = 35
HEAD_WIDTH = 64  # of ViT-L and of BERT: heads follow, which tensors do not tell
VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
RENAMED = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
)
UNUSED = re.compile(r"embeddings\.position_ids|pooler\..*")  # not asked for by the score

Tensors = dict[str, torch.Tensor]


class ImageReward:
    """ImageReward v1.0 from `ImageReward.pt`."""

    def __init__(self, spec: ImageRewardSpec, device: torch.device) -> None:
        self.tokenizer = read_tokenizer(
            f"reward.tokenizer={spec.tokenizer}", "BERT tokenizer", spec.tokenizer
        )
        with reading(f"reward at {spec.path}", "ImageReward checkpoint"):
            tensors = read_tensors(spec.path)
            self.vision = _vision(_below(tensors, VISION))
            self.text = _text(_below(tensors, TEXT), self.vision.config.hidden_size)
            self.head = linear_layers(_below(tensors, HEAD), "", LAYERS)
        parts: list[nn.Module] = [self.vision, self.text, self.head]
        for part in parts:
            part.requires_grad_(False).eval().to(device)
        size = self.vision.config.image_size
        crop = {"height": size, "width": size}
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop)
        self.device = device
        self.precision = spec.precision

    @cached_property
    def fingerprint(self) -> str:
        together = "".join(fingerprint(part) for part in (self.vision, self.text, self.head))
        return hashlib.sha256(together.encode()).hexdigest()

    @torch.no_grad()
    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"].to(self.device)
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        ).to(self.device)
        with computing_in(self.precision, self.device):
            seen = self.vision(pixel_values=pixels).last_hidden_state
            read = self.text(
                input_ids=tokens["input_ids"],
                attention_mask=tokens["attention_mask"],
                encoder_hidden_states=seen,
            ).last_hidden_state
        ratings = self.head(read[:, 0].float())[:, 0]
        scores: np.ndarray = ((ratings - MEAN) / STD).cpu().numpy()
        return scores


def _below(tensors: Tensors, prefix: str) -> Tensors:
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


def _vision(tensors: Tensors) -> BlipVisionModel:
    width, _, patch, _ = take(tensors, "patch_embed.proj.weight").shape
    patches = take(tensors, "pos_embed").shape[1] - 1
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=take(tensors, "blocks.0.mlp.fc1.weight").shape[0],
        num_hidden_layers=count_blocks(tensors, "blocks."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=patch * math.isqrt(patches),
        patch_size=patch,
        layer_norm_eps=1e-6,  # timm's, of which BLIP's vision transformer is a copy
    )
    renamed = {}
    for name, value in tensors.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return filled(BlipVisionModel, config, renamed)


def _text(tensors: Tensors, vision_width: int) -> BlipTextModel:
    vocabulary, width = take(tensors, "embeddings.word_embeddings.weight").shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=vision_width,
        intermediate_size=take(tensors, "encoder.layer.0.intermediate.dense.weight").shape[0],
        num_hidden_layers=count_blocks(tensors, "encoder.layer."),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        max_position_embeddings=take(tensors, "embeddings.position_embeddings.weight").shape[0],
        is_decoder=True,  # what gives transformers' layers their cross-attention
    )
    used = {name: value for name, value in tensors.items() if not UNUSED.fullmatch(name)}
    return filled(BlipTextModel, config, used, add_pooling_layer=False)
