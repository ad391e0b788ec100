"""Reading folders of pretrained models: a wrong one becomes one line that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from torch import nn

from ..errors import OutsideError

# What diffusers, transformers and safetensors raise over damaged or incomplete folders.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


@contextmanager
def reading(what: str, kind: str) -> Iterator[None]:
    """Raise OutsideError, "``what`` is no ``kind``: reason", for whatever a library makes of it."""
    try:
        yield
    except _UNREADABLE as error:
        reason = str(error).strip().split("\n")[0]
        raise OutsideError(f"{what} is no {kind}: {reason}") from None


def read_network(
    network: type[ModelMixin], path: str, dtype: torch.dtype, *, key: str, kind: str
) -> Any:
    """A network of its own folder or hub id, which the recipe names under ``key``."""
    with reading(f"{key}={path}", kind):
        # A config of another class would be read as one full of defaults: a network of full size.
        found = network.load_config(path).get("_class_name", "something else")
        if found != network.__name__:
            raise ValueError(f"it holds a {found}, not a {network.__name__}")
        loaded = network.from_pretrained(path, dtype=dtype)
        refuse_missing_weights(loaded, kind)
    return loaded


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
