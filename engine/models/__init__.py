"""Model families, one file each, behind the protocol of :mod:`cdpo.engine.models.protocol`.

The file of a family has the name that recipes know it by (`recipe/family.py` is the list), and
four functions:

=====================  ========================================================================
``load``               reads the recipe's model: (spec, device, dtype) -> :class:`Backbone`;
                       with ``reads_text=False`` its text encoders have no values
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

from ..basics.errors import DataError
from ..recipe import Model
from .fingerprint_store import model_files
from .fingerprints import PARTS, fingerprint, fingerprint_of_text, quantized_parts, told_of
from .pipelines import TEXT_ENCODERS, pipeline_config, text_parts_here
from .protocol import Backbone, Conditioning, Draw, Framing, NoiseProcess, StoredPrompts
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


def load_backbone(
    spec: Model,
    device: torch.device,
    precision: str = "fp32",
    stored: StoredPrompts | None = None,
) -> Backbone:
    """The backbone a recipe names, with ``stored`` prompts in place of its text encoders if given:
    DataError where those are found to be others than the model's own, or no such embeddings.
    """
    if spec.quantization is not None:
        refuse_missing_library(spec.quantization)
    dtype = DTYPES[precision]
    # As they are before they are read.
    files = model_files(spec, dtype, stored.fingerprint if stored else None)
    if stored:
        known = model_files(spec, dtype).read() or files.read()
        _refuse_other_text(spec, known["text"] if known else text_here(spec, dtype), stored)
    family = family_of(spec)
    backbone: Backbone = family.load(spec, device, dtype, reads_text=stored is None)
    if stored:
        parts = backbone.pipeline.components
        encoders = {name: parts[name] for name in TEXT_ENCODERS if parts.get(name) is not None}
        backbone.take_prompts(stored, family.told(backbone.denoiser.config, encoders))
    backbone.files = files
    backbone.place(spec.quantization)
    return backbone


def _refuse_other_text(spec: Model, own: str | None, stored: StoredPrompts) -> None:
    """Where the model's own is not known, as its text encoders are not here, nothing is wrong."""
    if own not in (None, stored.fingerprint):
        raise DataError(
            f"data.text=stored: the prompts in {stored.location} were embedded with another "
            f"{PARTS['text']} than that of model.path={spec.path}: run prepare again with this "
            "model, or use data.text=live",
            "data.text",
            "mismatch",
        )


def text_here(spec: Model, dtype: torch.dtype) -> str | None:
    """The fingerprint of a model's text encoders and tokenizers; None where not all weights are on
    this machine.
    """
    try:
        chats = spec.family.chats
        told = {name: told_of(part, chats=chats) for name, part in text_parts_here(spec, dtype)}
    except FileNotFoundError:
        return None
    return fingerprint_of_text(told, pipeline_config(spec))


def family_of(spec: Model) -> Any:
    """The file of the family a recipe names, as a module."""
    return import_module(f".{spec.backbone}", __package__)


def known_fingerprints(spec: Model, precision: str = "fp32") -> dict[str, str] | None:
    """Those of the backbone a recipe names, if its files are as they were when it was last loaded
    in this precision; of a hub id, those in the hub's cache.
    """
    found = model_files(spec, DTYPES[precision]).read()
    return found and found | quantized_parts(spec.quantization)
