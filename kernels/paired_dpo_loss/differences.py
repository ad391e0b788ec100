"""What `paired_dpo_loss` compares, in plain PyTorch, and the arguments that both take.

For an image with n elements, x = prediction − target, per `distance`:

    mse            e = 1/n Σ x²                    e_p − e_r = 1/n Σ (p − r)(x_p + x_r)
    pseudo_huber   e = 1/n Σ x² / (√(x² + c²) + c)
                   e_p − e_r = 1/n Σ (p − r)(x_p + x_r) / (√(x_p² + c²) + √(x_r² + c²))

The difference is accumulated itself, so that identical networks give exactly 0; a subtraction of
two rounded means would not. Losses of another form than DPO's are built on it: they are a few
microseconds of a step, and PyTorch differentiates them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import (
    as_float32,
    check_choice,
    check_floating,
    check_pairs,
    check_positive,
    check_same_device,
    compute_dtype,
)

DISTANCES = ("mse", "pseudo_huber")


class PairedDifferences(NamedTuple):
    """What `paired_differences` returns; float32, unless an input was float64."""

    difference: Tensor  # (2B,) policy minus reference error, differentiable in policy
    policy_error: Tensor  # (2B,) detached
    reference_error: Tensor  # (2B,) detached


def paired_differences(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    distance: str = "mse",
    huber_c: float = 1e-3,
) -> PairedDifferences:
    """What `paired_dpo_loss` compares, for losses of another form: plain PyTorch on any device.

    Arguments are those of `paired_dpo_loss`. The difference is accumulated itself, so that
    identical networks give exactly 0.
    """
    check_comparison(policy, reference, target, 1.0, distance, huber_c)
    difference, *errors = differences(policy, reference, target, distance, as_float32(huber_c))
    return PairedDifferences(difference, *(error.detach() for error in errors))


def check_comparison(
    policy: Tensor, reference: Tensor, target: Tensor, scale: float, distance: str, huber_c: float
) -> None:
    """Refuse, before any launch, what a comparison of pairs cannot take."""
    check_floating(policy=policy, reference=reference, target=target)
    check_same_device(policy=policy, reference=reference, target=target)
    check_positive(scale=scale, huber_c=huber_c)
    check_choice("distance", distance, DISTANCES)
    check_pairs("policy is", policy)
    batch, sample = policy.shape[:1], policy.shape[1:]
    if reference.ndim == 1 and reference.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"reference errors are {reference.dtype}; they must be float32")
    if reference.shape not in (policy.shape, batch):
        raise ValueError(
            f"reference is {tuple(reference.shape)}; it must be {tuple(policy.shape)} like policy, "
            f"or {tuple(batch)} for cached errors"
        )
    if target.shape not in (policy.shape, (batch[0] // 2, *sample)):
        raise ValueError(
            f"target is {tuple(target.shape)}; it must be {tuple(policy.shape)} like policy, or "
            f"{(batch[0] // 2, *sample)} shared by winner and loser"
        )


def differences(
    policy: Tensor, reference: Tensor, target: Tensor, distance: str, huber_c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(2B,) each: policy minus reference error without cancellation, and both errors."""
    dtype, sample = compute_dtype(policy, reference, target), tuple(range(1, policy.ndim))
    if target.shape[0] != policy.shape[0]:
        target = torch.cat([target, target])
    huber, t, p, r = distance == "pseudo_huber", *(x.to(dtype) for x in (target, policy, reference))
    x_p = p - t
    root_p = (x_p * x_p + huber_c * huber_c).sqrt() if huber else x_p
    policy_error = (x_p * x_p / (root_p + huber_c) if huber else x_p * x_p).mean(sample)
    if r.ndim == 1:
        return policy_error - r, policy_error, r.clone()
    x_r = r - t
    root_r = (x_r * x_r + huber_c * huber_c).sqrt() if huber else x_r
    reference_error = (x_r * x_r / (root_r + huber_c) if huber else x_r * x_r).mean(sample)
    difference = (p - r) * (x_p + x_r)
    difference = (difference / (root_p + root_r) if huber else difference).mean(sample)
    return difference, policy_error, reference_error
