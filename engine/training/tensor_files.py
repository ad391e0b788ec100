"""Tensors of the host as safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..basics.errors import told_by


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, in a folder made for it; OSError if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors():
        save_file(tensors, path, {"format": "pt"} | (metadata or {}))


@contextmanager
def disk_errors() -> Iterator[None]:
    """OSError for what safetensors makes of a full disk."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(told_by(error)) from None
