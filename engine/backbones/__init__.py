"""Model families, one file each, behind the protocol of :mod:`cdpo.engine.backbones.protocol`."""

from __future__ import annotations

import torch

from ..errors import RecipeError
from ..recipe import Model
from .protocol import Backbone, Conditioning, Draw, NoiseProcess
from .sd import StableDiffusion, fingerprint

__all__ = [
    "DTYPES",
    "Backbone",
    "Conditioning",
    "Draw",
    "NoiseProcess",
    "fingerprint",
    "load_backbone",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_backbone(spec: Model, device: torch.device, precision: str = "fp32") -> Backbone:
    """The backbone a recipe names; RecipeError for families that are declared but not built yet."""
    if spec.backbone != "sd":
        raise RecipeError(
            f"model.backbone={spec.backbone} is not built yet: this version runs `sd` "
            "(Stable Diffusion 1.x and 2.x)"
        )
    return StableDiffusion.load(spec, device, DTYPES[precision])
