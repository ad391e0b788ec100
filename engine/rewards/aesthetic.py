"""LAION's aesthetic predictor: how people would rate an image, from 1 to 10, whatever its prompt.

Schuhmann's improved predictor `sac+logos+ava1-l14-linearMSE`: five linear layers, with nothing but
dropout between them, over the image embedding of CLIP ViT-L/14 at length 1. His first one,
`sa_0_4_vit_l_14_linear`, is a single layer over the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..models import fingerprint
from ..models.pretrained import reading
from ..recipe.reward import AestheticSpec
from .clip import read_clip
from .tensor_files import read_tensors, take

LAYERS = (0, 2, 4, 6, 7)  # places of the linear layers; dropout, without tensors, has the others


class Aesthetic:
    """A CLIP for its image embeddings, and the layers that rate them, in float32."""

    def __init__(self, spec: AestheticSpec, device: torch.device) -> None:
        self.clip = read_clip(spec, device)
        with reading(f"reward.head={spec.head}", "aesthetic predictor"):
            self.head = _head(read_tensors(spec.head))
            width = self.clip.model.config.projection_dim
            if self.head[0].in_features != width:
                raise ValueError(
                    f"it rates embeddings of width {self.head[0].in_features}, and those of "
                    f"{spec.path} have {width}"
                )
        self.head.to(device)

    @cached_property
    def fingerprint(self) -> str:
        both = self.clip.fingerprint + fingerprint(self.head)
        return hashlib.sha256(both.encode()).hexdigest()

    @torch.no_grad()
    def score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        ratings: np.ndarray = self.head(self.clip.embed_images(images))[:, 0].cpu().numpy()
        return ratings


def _head(tensors: dict[str, torch.Tensor]) -> nn.Sequential:
    if tensors.keys() == {"weight", "bias"}:
        return linear_layers({f"0.{name}": value for name, value in tensors.items()}, "", (0,))
    return linear_layers(tensors, "layers.", LAYERS)


def linear_layers(
    tensors: dict[str, torch.Tensor], prefix: str, places: Sequence[int]
) -> nn.Sequential:
    """Frozen linear layers of tensors ``prefix``N.weight and .bias, the last one of width 1.

    ValueError for tensors that are missing, left over or do not follow each other.
    """
    layers = []
    for place in places:
        weight = take(tensors, f"{prefix}{place}.weight")
        bias = take(tensors, f"{prefix}{place}.bias")
        if weight.dim() != 2:
            raise ValueError(f"{prefix}{place}.weight is no matrix")
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.load_state_dict({"weight": weight, "bias": bias}, assign=True)
        layers.append(layer)
    if len(tensors) != 2 * len(places):
        raise ValueError(f"it has {len(tensors)} tensors instead of {2 * len(places)}")
    widths = [layer.in_features for layer in layers[1:]] + [1]
    if [layer.out_features for layer in layers] != widths:
        raise ValueError("its layers do not follow each other down to one number")
    return nn.Sequential(*layers).requires_grad_(False).eval()
