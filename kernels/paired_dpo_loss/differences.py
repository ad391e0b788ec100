"""What `paired_dpo_loss` compares, in plain PyTorch, and the arguments that both take.

For an image with n elements, x = s · (prediction − target), s a pair's slope or 1, per `distance`:

    mse            e = 1/n Σ x²                    e_p − e_r = 1/n Σ (x_p − x_r)(x_p + x_r)
    pseudo_huber   e = 1/n Σ x² / (√(x² + c²) + c)
                   e_p − e_r = 1/n Σ (x_p − x_r)(x_p + x_r) / (√(x_p² + c²) + √(x_r² + c²))

with x_p − x_r = s · (p − r). The difference is accumulated itself, so that identical networks give
exactly 0; a subtraction of two rounded means would not. Losses of another form than DPO's are built
on it: they are a few microseconds of a step, and PyTorch differentiates them.

The loser's gradient is multiplied by a share κ, the value is not. With g = ∂e_p/∂p of winner and
loser, a step along −(g_w − κ g_l) changes the winner's error by −(‖g_w‖² − κ ⟨g_w, g_l⟩), so that

    κ = loser_gradient · min(1, (1 − μ) ‖g_w‖² / ⟨g_w, g_l⟩)       where ⟨g_w, g_l⟩ > 0, else 1

leaves the winner a share μ of what it gained without the loser (Diffusion-SDPO, arXiv 2511.03317,
a pair at a time). μ is `safeguard`; without one κ is `loser_gradient`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import (
    as_float32,
    check_choice,
    check_floating,
    check_pairs,
    check_per_pair,
    check_positive,
    check_same_device,
    compute_dtype,
)

DISTANCES = ("mse", "pseudo_huber")


class Comparison(NamedTuple):
    """How predictions of pairs are compared; the names are those of `paired_dpo_loss`."""

    slopes: Tensor | None
    weights: Tensor | None
    scale: float
    distance: str
    huber_c: float
    loser_gradient: float
    safeguard: float | None

    @property
    def is_huber(self) -> bool:
        return self.distance == "pseudo_huber"

    def rounded(self) -> "Comparison":
        """With the scalars as a kernel sees them."""
        return self._replace(
            scale=as_float32(self.scale),
            huber_c=as_float32(self.huber_c),
            loser_gradient=as_float32(self.loser_gradient),
            safeguard=None if self.safeguard is None else as_float32(self.safeguard),
        )


class PairedDifferences(NamedTuple):
    """What `paired_differences` returns; float32, unless an input was float64."""

    margin: Tensor  # (B,) winner's minus loser's (policy minus reference) error, differentiable
    policy_error: Tensor  # (2B,) detached, as are the next two
    reference_error: Tensor  # (2B,)
    loser_kept: Tensor  # (B,) the share of the loser's gradient


def paired_differences(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    *,
    distance: str = "mse",
    huber_c: float = 1e-3,
    slopes: Tensor | None = None,
    loser_gradient: float = 1.0,
    safeguard: float | None = None,
) -> PairedDifferences:
    """What `paired_dpo_loss` compares, for losses of another form: plain PyTorch on any device.

    Arguments are those of `paired_dpo_loss`. The margin is accumulated itself, so that identical
    networks give exactly 0.
    """
    how = Comparison(slopes, None, 1.0, distance, huber_c, loser_gradient, safeguard)
    check_comparison(policy, reference, target, how)
    return differences(policy, reference, target, how.rounded())


def check_comparison(policy: Tensor, reference: Tensor, target: Tensor, how: Comparison) -> None:
    """Refuse, before any launch, what a comparison of pairs cannot take."""
    check_floating(policy=policy, reference=reference, target=target)
    check_positive(scale=how.scale, huber_c=how.huber_c)
    check_choice("distance", how.distance, DISTANCES)
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
    numbers = {"slopes": how.slopes, "weights": how.weights}
    given = {name: x for name, x in numbers.items() if x is not None}
    check_per_pair(batch[0] // 2, torch.float32, **given)
    check_same_device(policy=policy, reference=reference, target=target, **given)
    for name in ("loser_gradient", "safeguard"):
        share = getattr(how, name)
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; it must be from 0 to 1")


def differences(
    policy: Tensor, reference: Tensor, target: Tensor, how: Comparison
) -> PairedDifferences:
    """What `paired_differences` returns, of arguments that are right."""
    dtype, sample = compute_dtype(policy, reference, target), tuple(range(1, policy.ndim))
    p, r, t = (x.to(dtype) for x in (policy, reference, target))
    x_p, slope = residuals(p, t, how.slopes)
    root_p = _root(x_p, how)
    policy_error = _errors(x_p, root_p, how).mean(sample)
    if r.ndim == 1:
        reference_error, difference = r.clone(), policy_error - r
    else:
        x_r, _ = residuals(r, t, how.slopes)
        root_r = _root(x_r, how)
        reference_error = _errors(x_r, root_r, how).mean(sample)
        difference = slope * (p - r) * (x_p + x_r)
        if how.is_huber:
            difference = difference / (root_p + root_r)
        difference = difference.mean(sample)
    winner, loser = difference.chunk(2)
    kept = torch.full_like(loser, how.loser_gradient).detach()
    if how.safeguard is not None:
        pull = x_p / root_p if how.is_huber else x_p
        kept = kept * _harmless(pull.detach(), how.safeguard)
    # The loser's value, with a share of its gradient: what is subtracted from itself is exactly 0
    damped = loser.detach() + kept * (loser - loser.detach())
    return PairedDifferences(winner - damped, policy_error.detach(), reference_error.detach(), kept)


def residuals(
    prediction: Tensor, target: Tensor, slopes: Tensor | None
) -> tuple[Tensor, Tensor | float]:
    """Of tensors that are alike in dtype: x = s · (prediction − target), (2B, ...), and s."""
    if target.shape[0] != prediction.shape[0]:
        target = torch.cat([target, target])
    if slopes is None:
        return prediction - target, 1.0
    slope = torch.cat([slopes, slopes]).to(prediction.dtype)
    slope = slope.view(-1, *[1] * (prediction.ndim - 1))
    return slope * (prediction - target), slope


def _root(x: Tensor, how: Comparison) -> Tensor:
    return (x * x + how.huber_c * how.huber_c).sqrt() if how.is_huber else x


def _errors(x: Tensor, root: Tensor, how: Comparison) -> Tensor:
    return x * x / (root + how.huber_c) if how.is_huber else x * x


def _harmless(pull: Tensor, safeguard: float) -> Tensor:
    """(B,) the share of the loser's gradient that the winner bears.

    pull: (2B, ...) the errors' slopes, whatever factor they have in common.
    """
    winner, loser = pull.flatten(1).chunk(2)
    own, shared = (winner * winner).sum(1), (winner * loser).sum(1)
    return torch.where(shared > 0, ((1 - safeguard) * own / shared).clamp(max=1), 1.0)
