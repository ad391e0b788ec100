"""Host to device without a wait: the one way that what a step is told gets there."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``; a GPU copies it when it comes to that, and the host goes on.

    It does so from pinned memory alone; that is given back when the copy is made.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send_numbers(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """int64 on ``device``, sent so."""
    return send(torch.tensor(numbers, dtype=torch.int64), device)
