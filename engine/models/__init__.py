"""Model families, one file each, behind the protocol of :mod:`cdpo.engine.models.protocol`.

The file of a family has the name that recipes know it by, and its ``load`` reads the recipe's
model: there is no list of them but that of the schema.
"""

from __future__ import annotations

from importlib import import_module

import torch

from ..recipe import Model
from .fingerprint_store import model_files
from .fingerprints import fingerprint
from .protocol import Backbone, Conditioning, Draw, Framing, NoiseProcess

__all__ = [
    "DTYPES",
    "Backbone",
    "Conditioning",
    "Draw",
    "Framing",
    "NoiseProcess",
    "fingerprint",
    "known_fingerprints",
    "load_backbone",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_backbone(spec: Model, device: torch.device, precision: str = "fp32") -> Backbone:
    """The backbone a recipe names."""
    family = import_module(f".{spec.backbone}", __package__)
    files = model_files(spec, DTYPES[precision])  # as they are before they are read
    backbone: Backbone = family.load(spec, device, DTYPES[precision])
    backbone.files = files
    return backbone


def known_fingerprints(spec: Model, precision: str = "fp32") -> dict[str, str] | None:
    """Those of the backbone a recipe names, if its files are as they were when it was last loaded
    in this precision; of a hub id, those in the hub's cache.
    """
    return model_files(spec, DTYPES[precision]).read()
