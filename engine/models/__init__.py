"""Model families, one file each, behind the protocol of :mod:`cdpo.engine.models.protocol`.

The file of a family has the name that recipes know it by, and its ``load`` reads the recipe's
model: there is no list of them but that of the schema.
"""

from __future__ import annotations

from importlib import import_module

import torch

from ..recipe import Model
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


def load_backbone(spec: Model, device: torch.device, precision: str = "fp32") -> Backbone:
    """The backbone a recipe names."""
    family = import_module(f".{spec.backbone}", __package__)
    backbone: Backbone = family.load(spec, device, DTYPES[precision])
    return backbone
