"""What one would type today for what the kernels do, with torch and diffusers: the baselines.

Written as a careful user would: a target that winner and loser share is broadcast, not copied, and
nothing runs that the result does not need.
"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULER = DDPMScheduler(**BETAS)  # of Stable Diffusion, SDXL and LCM


def diffusion_dpo_loss(policy: Tensor, reference: Tensor, target: Tensor, scale: float) -> Tensor:
    """Reference as predictions; the arithmetic of diffusers' DPO training script."""
    return _loss(_mse(policy, target), _mse(reference, target), scale)


def cached_dpo_loss(policy: Tensor, reference: Tensor, target: Tensor, scale: float) -> Tensor:
    """Reference as (2B,) errors."""
    return _loss(_mse(policy, target), reference.unflatten(0, (2, -1)), scale)


def consistency_dpo_loss(
    policy: Tensor, reference: Tensor, target: Tensor, scale: float, huber_c: float
) -> Tensor:
    """Pseudo-Huber; the target differs between winner and loser."""
    policy_error, reference_error = (_huber(x, target, huber_c) for x in (policy, reference))
    return _loss(policy_error, reference_error, scale)


def _mse(prediction: Tensor, target: Tensor) -> Tensor:
    """(2, B) mean squared errors, winners and losers."""
    difference = _float(prediction).unflatten(0, (2, -1)) - _float(target)
    return difference.square().flatten(2).mean(2)


def _huber(prediction: Tensor, target: Tensor, c: float) -> Tensor:
    difference = _float(prediction) - _float(target)
    return ((difference.square() + c * c).sqrt() - c).unflatten(0, (2, -1)).flatten(2).mean(2)


def _loss(policy_error: Tensor, reference_error: Tensor, scale: float) -> Tensor:
    difference = policy_error - reference_error
    return -F.logsigmoid(-scale * (difference[0] - difference[1])).mean()


def noise(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One draw for all pairs: it does not depend on the keys, which is its advantage here."""
    return torch.randn(len(keys), *shape, device=keys.device)


def noise_by_generators(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A generator a pair, as diffusers' `randn_tensor` takes them: repeatable for every pair."""
    generators = [torch.Generator(keys.device).manual_seed(item) for item in range(len(keys))]
    drawn = [torch.randn(shape, generator=one, device=keys.device) for one in generators]
    return torch.stack(drawn)


def add_noise(latents: Tensor, timesteps: Tensor, noise: Tensor | None = None) -> list[Tensor]:
    """(2B, ...) latents of pairs that share noise: the noisy ones and the noise."""
    winners = latents[: len(timesteps)]
    noise = torch.randn_like(winners) if noise is None else noise.to(latents.dtype)
    both, twice = torch.cat([noise, noise]), torch.cat([timesteps, timesteps])
    return [SCHEDULER.add_noise(latents, both, twice), noise]


def consistency_solver_step(
    teacher: Tensor,
    noisy: Tensor,
    guidance: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    earlier_alpha: Tensor,
    earlier_sigma: Tensor,
    **_: Tensor,
) -> Tensor:
    """Guidance on x0 and ε and one DDIM step, as in diffusers' LCM distillation scripts."""
    w, alpha, sigma = _per_image(guidance), _per_image(alpha), _per_image(sigma)
    conditional, unconditional = teacher.chunk(2)
    clean, unguided = ((noisy - sigma * x) / alpha for x in (conditional, unconditional))
    clean = clean + w * (clean - unguided)
    noise = conditional + w * (conditional - unconditional)
    previous = _per_image(earlier_alpha) * clean + _per_image(earlier_sigma) * noise
    return previous.to(noisy.dtype)


def consistency_targets(
    answer: Tensor,
    previous: Tensor,
    noisy: Tensor,
    of_noisy: Tensor,
    of_prediction: Tensor,
    earlier_of_noisy: Tensor,
    earlier_of_prediction: Tensor,
) -> Tensor:
    """The frozen network's answer at previous, as a prediction at noisy."""
    y = _per_image(earlier_of_noisy) * previous + _per_image(earlier_of_prediction) * answer
    return (y - _per_image(of_noisy) * noisy) / _per_image(of_prediction)


def _per_image(x: Tensor) -> Tensor:
    """(B,) numbers of pairs, for the winners and losers of (2B, C, h, w)."""
    return torch.cat([x, x])[:, None, None, None]


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    return F.group_norm(x, num_groups, weight, bias, eps)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def geglu(projected: Tensor) -> Tensor:
    hidden, gate = projected.chunk(2, -1)
    return hidden * F.gelu(gate)


def _float(x: Tensor) -> Tensor:
    """float32, but float64 stays, for the check against the truth."""
    return x if x.dtype == torch.float64 else x.float()
