"""Weights that were published as a file of their own: tensors by name, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file

from ..basics.errors import told_by
from ..basics.files import LFS_REMEDY, is_lfs_pointer

WRAPPERS = ("state_dict", "model", "module")  # keys that trainers put their weights under


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Float32 tensors of a .safetensors file, or of a PyTorch file, of which nothing but tensors is
    taken: a pickle could hold code.

    Weights below a key such as ``state_dict`` are found, and a prefix ``module.`` goes. Raises what
    reading files raises, and ValueError for a file of anything else.
    """
    if not Path(path).is_file():
        raise ValueError("there is no such file")
    if is_lfs_pointer(path):
        raise ValueError(f"it {LFS_REMEDY}")
    if path.endswith(".safetensors"):
        found: Any = load_file(path)
    else:
        found = _read_pytorch(path)
    for key in WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise ValueError("it holds no tensors by name")
    if not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError("it holds something else beside tensors")
    prefix = "module." if all(name.startswith("module.") for name in found) else ""
    return {name.removeprefix(prefix): _float(value) for name, value in found.items()}


def take(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """A tensor that must be there; ValueError names it where it is not."""
    if name not in tensors:
        raise ValueError(f"it lacks {name}")
    return tensors[name]


def count_blocks(tensors: Mapping[str, torch.Tensor], prefix: str) -> int:
    """Number of consecutive blocks ``prefix``0, ``prefix``1, ... ; ValueError for none."""
    numbers = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
    if not numbers or numbers != {str(number) for number in range(len(numbers))}:
        raise ValueError(f"it lacks blocks of {prefix}N")
    return len(numbers)


def filled(kind: Any, config: Any, tensors: Mapping[str, torch.Tensor], **options: Any) -> Any:
    """A model of transformers, in float32, with these weights and no others; ValueError for tensors
    that are missing, left over or of another shape, which transformers would make up or leave out.
    """
    model, report = kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        output_loading_info=True,
        **options,
    )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            raise ValueError(f"{problem.replace('_', ' ')}, e.g. {min(report[problem])}")
    return model


def _read_pytorch(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError) as error:
        raise ValueError(f"it is no file of tensors alone: {told_by(error)}") from None


def _float(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() else value
