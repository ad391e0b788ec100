"""Memory, the device's or the host's: how much there is, and whether an error is about it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")


def device_memory(device: torch.device, local_size: int) -> int:
    """Bytes that one of ``local_size`` ranks of this machine may count on: all of its GPU's, or its
    part of the host's, which containers and schedulers may have bounded.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_bounds()]) // local_size


def _bounds(own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What this process's control group and those around it bound memory to, in bytes."""
    found: list[int] = []
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root = CGROUPS / controllers
            file = "memory.limit_in_bytes" if controllers else "memory.max"
            group = root / name.lstrip("/")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # no such file there, or "max"
                    found.append(int((folder / file).read_text()))
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU or of the host: PyTorch has no class of its own for the latter, nor for what CUDA
    says outside of PyTorch's allocator.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)
