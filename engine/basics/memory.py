"""Whether an error is about memory, the device's or the host's."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Of the GPU or of the host: PyTorch has no class of its own for the latter, nor for what CUDA
    says outside of PyTorch's allocator.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "not enough memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)
