"""Model families, one file each, behind the protocol of :mod:`cdpo.engine.models.protocol`."""

from __future__ import annotations

import torch

from ..recipe import Model
from . import lcm, sd, sdxl
from .pretrained import fingerprint
from .protocol import Backbone, Conditioning, Draw, Framing, NoiseProcess

__all__ = [
    "DTYPES",
    "Backbone",
    "Conditioning",
    "Draw",
    "Framing",
    "NoiseProcess",
    "fingerprint",
    "load_backbone",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES = {"sd": sd.load, "sdxl": sdxl.load, "lcm": lcm.load}


def load_backbone(spec: Model, device: torch.device, precision: str = "fp32") -> Backbone:
    """The backbone a recipe names."""
    return FAMILIES[spec.backbone](spec, device, DTYPES[precision])
