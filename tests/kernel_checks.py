"""What tests of kernels hold numbers to, and how many drawn cases they try."""

from __future__ import annotations

import numpy as np
import torch
from cdpo.kernels.dispatch import INTERPRETED
from hypothesis import HealthCheck, settings
from torch import Tensor

EPS32 = 2.0**-23
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Of a test that runs on both backends: the interpreter takes a hundred times as long for each.
drawn_cases = settings(
    max_examples=8 if INTERPRETED else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def assert_loses_at_most_twice(
    found: Tensor, true: np.ndarray, typed: Tensor, size: float = 0.0
) -> None:
    """An error is at most twice that of PyTorch in float32, and one rounding to the result's dtype:
    a whole unit in the last place, since the interpreter truncates to bf16.

    size: of a sum, the root of its terms' squares: it may be small where they cancel.
    """
    lost = np.abs(typed.detach().double().numpy() - true).max()
    info = torch.finfo(found.dtype)
    # A few roundings of the largest value, where PyTorch happened to lose nothing
    bound = 2 * lost + 4 * EPS32 * max(np.abs(true).max(), size) + info.smallest_normal
    error = np.abs(found.detach().cpu().double().numpy() - true)
    assert found.shape == true.shape
    assert (error <= bound + info.eps * np.abs(true)).all(), (error.max(), bound)
