"""Reading folders of pretrained models: a wrong one becomes one line that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


def refuse_missing_weights(module: nn.Module, name: str) -> None:
    """ValueError if the files held no value for some parameter: it has no data to compute with."""
    missing = [key for key, parameter in module.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(f"the weights of its {name} lack {missing[0]}")
