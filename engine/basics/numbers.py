"""Numbers that are none: whether a tensor holds any."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity among the numbers.

    The extremes tell: NaN is passed on. That is one pass, without a mask beside the tensor.
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.stack(torch.aminmax(tensor)).isfinite().all())
