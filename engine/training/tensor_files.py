"""Tensors of the host as safetensors files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
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
    with disk_errors(path):
        save_file(tensors, path, {"format": "pt"} | (metadata or {}))


_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """OSError, of the system's number and ``path``, for what safetensors makes of a full disk."""
    try:
        yield
    except SafetensorError as error:
        number = _OS_ERROR.search(told := told_by(error))
        code, reason = (int(number[1]), os.strerror(int(number[1]))) if number else (EIO, told)
        raise OSError(code, reason, str(path)) from None
