"""The formulas of `consistency_step` in plain PyTorch, in float32 or float64.

They follow the Triton programs operation by operation, so that the bits are the same.
"""

import torch
from torch import Tensor

from ..dispatch import compute_dtype


def solver_step(
    teacher: Tensor,
    noisy: Tensor,
    guidance: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    earlier_alpha: Tensor,
    earlier_sigma: Tensor,
    prediction: str,
) -> Tensor:
    """Guidance, then one DDIM step: (2B, ...) from the teacher's (4B, ...)."""
    x, dtype = noisy, compute_dtype(teacher, noisy)
    conditional, unconditional = teacher.to(dtype).chunk(2)
    guided = conditional + _column(guidance, x, dtype) * (conditional - unconditional)
    levels = (_column(alpha, x, dtype), _column(sigma, x, dtype))
    clean = _clean(x.to(dtype), guided, *levels, prediction)
    noise = _noise(x.to(dtype), guided, *levels, prediction)
    return _column(earlier_alpha, x, dtype) * clean + _column(earlier_sigma, x, dtype) * noise


def targets(
    prediction: Tensor,
    previous: Tensor,
    noisy: Tensor,
    of_noisy: Tensor,
    of_prediction: Tensor,
    earlier_of_noisy: Tensor,
    earlier_of_prediction: Tensor,
) -> Tensor:
    """The frozen network's answer at previous, as a prediction at noisy: (2B, ...)."""
    x, dtype = prediction, compute_dtype(prediction, previous, noisy)
    answer = _column(earlier_of_noisy, x, dtype) * previous.to(dtype)
    answer = answer + _column(earlier_of_prediction, x, dtype) * prediction.to(dtype)
    slope = _column(of_prediction, x, dtype)
    found = (answer - _column(of_noisy, x, dtype) * noisy.to(dtype)) / slope
    return torch.where(slope == 0, 0.0, found)


def _column(numbers: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """One number a pair, for winner and loser, broadcast over their elements."""
    return torch.cat([numbers, numbers]).to(dtype).view(-1, *[1] * (like.ndim - 1))


def _clean(x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    if prediction == "epsilon":
        return (x - sigma * output) / alpha
    return alpha * x - sigma * output if prediction == "v_prediction" else output


def _noise(x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    if prediction == "sample":
        return (x - alpha * output) / sigma
    return alpha * output + sigma * x if prediction == "v_prediction" else output
