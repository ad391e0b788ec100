"""The formulas of `consistency_step` in plain PyTorch, in float32 or float64.

They follow the Triton programs operation by operation, so that the bits are the same. PyTorch can
differentiate them.
"""

from collections.abc import Sequence

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


def consistency_function(
    output: Tensor,
    x: Tensor,
    point: Sequence[Tensor],
    prediction: str,
    timestep_scaling: float,
    sigma_data: float,
    dtype: torch.dtype,
) -> Tensor:
    """f(x, t) of a network's output at x, (2B, ...); the point is timesteps, α and σ."""
    timesteps, alpha, sigma = point
    c_skip, c_out = scalings(timesteps, timestep_scaling, sigma_data, dtype)
    levels = (_column(alpha, x, dtype), _column(sigma, x, dtype))
    clean = _clean(x.to(dtype), output.to(dtype), *levels, prediction)
    return _column(c_skip, x, dtype) * x.to(dtype) + _column(c_out, x, dtype) * clean


def consistency_gradient(
    grad_output: Tensor,
    point: Sequence[Tensor],
    prediction: str,
    timestep_scaling: float,
    sigma_data: float,
) -> Tensor:
    """The gradient of the network's output from that of f."""
    dtype = compute_dtype(grad_output)
    timesteps, alpha, sigma = point
    _, slope = scalings(timesteps, timestep_scaling, sigma_data, dtype)
    if prediction == "epsilon":
        slope = slope * (-sigma.to(dtype) / alpha.to(dtype))
    elif prediction == "v_prediction":
        slope = slope * -sigma.to(dtype)
    return grad_output.to(dtype) * _column(slope, grad_output, dtype)


def scalings(
    timesteps: Tensor, timestep_scaling: float, sigma_data: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """c_skip and c_out (B,)."""
    s = timestep_scaling * timesteps.to(dtype)
    # A tensor, for PyTorch takes number / tensor as number · (1 / tensor), which rounds twice
    variance = torch.full_like(s, sigma_data * sigma_data)
    total = s * s + variance
    # By way of float64, for a CPU's float32 root is not always the nearest number
    return variance / total, s / total.double().sqrt().to(dtype)


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
