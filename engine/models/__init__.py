"""Model families, one file each, behind the protocol of :mod:`cdpo.engine.models.protocol`.

The file of a family has the name that recipes know it by (`recipe/family.py` is the list), and
four functions:

=====================  ========================================================================
``load``               reads the recipe's model: (spec, device, dtype) -> :class:`Backbone`
``check``              refuses what does not fit, before weights are read: (spec, config of the
                       denoiser, of the VAE)
``ask``                calls the denoiser: (network, noisy, timesteps, conditioning) -> prediction
``told``               the sizes of what it is told: (config of the denoiser, text encoders)
=====================  ========================================================================

The last three take networks on the meta device as well: they are all that a dry run knows.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from ..recipe import Model
from .fingerprint_store import model_files
from .fingerprints import fingerprint, quantized_parts
from .protocol import Backbone, Conditioning, Draw, Framing, NoiseProcess
from .quantization import refuse_missing_library

__all__ = [
    "DTYPES",
    "Backbone",
    "Conditioning",
    "Draw",
    "Framing",
    "NoiseProcess",
    "family_of",
    "fingerprint",
    "known_fingerprints",
    "load_backbone",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load_backbone(spec: Model, device: torch.device, precision: str = "fp32") -> Backbone:
    """The backbone a recipe names."""
    if spec.quantization is not None:
        refuse_missing_library(spec.quantization)
    files = model_files(spec, DTYPES[precision])  # as they are before they are read
    backbone: Backbone = family_of(spec).load(spec, device, DTYPES[precision])
    backbone.files = files
    backbone.place(spec.quantization)
    return backbone


def family_of(spec: Model) -> Any:
    """The file of the family a recipe names, as a module."""
    return import_module(f".{spec.backbone}", __package__)


def known_fingerprints(spec: Model, precision: str = "fp32") -> dict[str, str] | None:
    """Those of the backbone a recipe names, if its files are as they were when it was last loaded
    in this precision; of a hub id, those in the hub's cache.
    """
    found = model_files(spec, DTYPES[precision]).read()
    return found and found | quantized_parts(spec.quantization)
