"""Reading folders of pretrained models: a wrong one becomes one line that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, UNet2DConditionModel
from torch import nn
from transformers import PreTrainedModel

from ..basics.errors import CdpoError, OutsideError
from ..recipe import Model


@contextmanager
def reading(what: str, kind: str) -> Iterator[None]:
    """Raise OutsideError, "``what`` is no ``kind``: reason", for whatever a library makes of it.

    Over damaged files that may be anything: tokenizers raises plain Exception, torch.load
    AssertionError, and a processor that needs a package ImportError.
    """
    try:
        yield
    except CdpoError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        key = what.partition("=")[0] if "=" in what else None
        raise OutsideError(f"{what} is no {kind}: {reason}", key, "unreadable") from None


def read_network(
    network: type[ModelMixin], path: str, dtype: torch.dtype, *, key: str, kind: str
) -> Any:
    """A network that the recipe names under ``key``: a folder or hub id of its own, or a whole
    pipeline, of which the UNet is meant.
    """
    with reading(f"{key}={path}", kind):
        subfolder = "unet" if network is UNet2DConditionModel and _holds_pipeline(path) else None
        # A config of another class would be read as one full of defaults: a network of full size.
        config = network.load_config(path, subfolder=subfolder)
        found = config.get("_class_name", "something else")
        if found != network.__name__:
            raise ValueError(f"it holds a {found}, not a {network.__name__}")
        loaded = network.from_pretrained(path, subfolder=subfolder, dtype=dtype)
        refuse_missing_weights(loaded, kind)
    return loaded


def read_text_encoder(
    encoder: type[PreTrainedModel], spec: Model, name: str, dtype: torch.dtype
) -> Any:
    """A text encoder of ``spec.path``, from its folder ``name``.

    transformers makes up the tensors that a file lacks, from random numbers, and a pipeline hides
    that it did. Raises ValueError for them, and what transformers raises for unreadable folders.
    """
    place = {"subfolder": name, "revision": spec.revision, "dtype": dtype}

    def read(variant: str | None) -> tuple[Any, dict[str, Any]]:
        found: tuple[Any, dict[str, Any]] = encoder.from_pretrained(
            spec.path, variant=variant, output_loading_info=True, **place
        )
        return found

    try:
        loaded, report = read(spec.variant)
    except OSError:  # as in diffusers, a variant need not exist of every part
        if spec.variant is None:
            raise
        loaded, report = read(None)
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"the weights of its {name} lack {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
    return loaded


def _holds_pipeline(path: str) -> bool:
    try:
        DiffusionPipeline.load_config(path)
    except OSError:
        return False
    return True


def refuse_missing_weights(module: nn.Module, name: str) -> None:
    """ValueError if the files held no value for some parameter: it has no data to compute with."""
    missing = [key for key, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"the weights of its {name} lack {missing[0]}")


def fingerprint(module: nn.Module) -> str:
    """sha256 over names and float32 values of a module's state: the same for any file format."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
