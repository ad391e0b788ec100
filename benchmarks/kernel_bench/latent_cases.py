"""Kernels on latents that every objective uses: the loss and the noise."""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from cdpo.kernels import paired_add_noise, paired_dpo_loss, philox_normal
from kernel_bench import eager_baselines as eager
from kernel_bench.case import BF16, DTYPE, FP32, Case, name_of
from kernel_bench.unet_layers import NETWORKS
from measuring.agreement import Function, Inputs, compare, compare_distributions
from torch import Tensor

BETA, CONSISTENCY_BETA, HUBER_C = 5000.0, 200.0, 1e-3
KEY = 32  # bytes of a pair's key

# -------------------------------------------------------------------------------------- the loss


def _predictions(
    model: str, pairs: int, distance: str, cached: bool, device: torch.device
) -> dict[str, Tensor]:
    """Policy and reference near each other, as in training, so that logits are of order 1."""
    latents = NETWORKS[model].latents
    huber = distance == "pseudo_huber"
    target = torch.randn((2 * pairs if huber else pairs, *latents), device=device)
    both = target if huber else torch.cat([target, target])
    policy = both + torch.randn_like(both)
    reference = (policy + 0.01 * torch.randn_like(both)).to(DTYPE)
    if cached:
        reference = (reference.float() - both).square().flatten(1).mean(1)
    return {
        "policy": policy.to(DTYPE).requires_grad_(),
        "reference": reference,
        "target": target,
    }


def _loss_case(
    name: str,
    model: str,
    pairs: int,
    ours: Function,
    eager_loss: Function,
    distance: str = "mse",
    cached: bool = False,
    **more: Any,
) -> Case:
    latents = NETWORKS[model].latents
    elements = 2 * pairs * prod(latents)
    target = (elements if distance == "pseudo_huber" else elements // 2) * FP32
    reference = 2 * pairs * FP32 if cached else elements * BF16
    results = (1 + 2 * pairs + 4 * pairs) * FP32  # loss, logits, shares kept, both errors
    return Case(
        kernel=name,
        model=model,
        pairs=pairs,
        shape=name_of((2 * pairs, *latents)),
        make_inputs=partial(_predictions, model, pairs, distance, cached),
        ours=ours,
        eager=eager_loss,
        bytes_forward=elements * BF16 + reference + target + results,
        bytes_backward=elements * BF16 + target + elements * BF16 + (1 + 2 * pairs) * FP32,
        **more,
    )


def _mse_loss(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    return paired_dpo_loss(policy, reference, target, BETA / 2).loss


def _huber_loss(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    return paired_dpo_loss(
        policy, reference, target, CONSISTENCY_BETA, distance="pseudo_huber", huber_c=HUBER_C
    ).loss


def paired_dpo_loss_cases(model: str, pairs: int) -> Iterator[Case]:
    case = partial(_loss_case, model=model, pairs=pairs)
    diffusion = partial(eager.diffusion_dpo_loss, scale=BETA / 2)
    cached = partial(eager.cached_dpo_loss, scale=BETA / 2)
    huber = partial(eager.consistency_dpo_loss, scale=CONSISTENCY_BETA, huber_c=HUBER_C)
    yield case("paired_dpo_loss", ours=_mse_loss, eager_loss=diffusion)
    yield case("paired_dpo_loss cached", ours=_mse_loss, eager_loss=cached, cached=True)
    yield case(
        "paired_dpo_loss pseudo_huber", ours=_huber_loss, eager_loss=huber, distance="pseudo_huber"
    )


# ------------------------------------------------------------------------------------- the noise


def _noise_inputs(model: str, pairs: int, device: torch.device) -> dict[str, Tensor]:
    """Keys, timesteps and latents of pairs; α and σ of every timestep."""
    alphas_cumprod = eager.SCHEDULER.alphas_cumprod.to(device, torch.float32)
    return {
        "latents": torch.randn(2 * pairs, *NETWORKS[model].latents, device=device).to(DTYPE),
        "timesteps": torch.randint(len(alphas_cumprod), (pairs,), device=device),
        "keys": _keys(pairs, device),
        "alphas": alphas_cumprod.sqrt(),
        "sigmas": (1 - alphas_cumprod).sqrt(),
    }


def _keys(pairs: int, device: torch.device) -> Tensor:
    return torch.randint(1 << 31, (pairs, 4), device=device)


def philox_normal_cases(model: str, pairs: int) -> Iterator[Case]:
    latents = NETWORKS[model].latents
    yield Case(
        kernel="philox_normal",
        model=model,
        pairs=pairs,
        shape=name_of((pairs, *latents)),
        make_inputs=lambda device: {"keys": _keys(pairs, device)},
        ours=partial(philox_normal, shape=latents),
        eager=partial(eager.noise, shape=latents),
        others={"a generator a pair": partial(eager.noise_by_generators, shape=latents)},
        bytes_forward=pairs * (prod(latents) * FP32 + KEY),
        agreement=compare_distributions,
    )


def _add_noise(
    latents: Tensor, timesteps: Tensor, keys: Tensor, alphas: Tensor, sigmas: Tensor
) -> tuple[Tensor, Tensor]:
    return paired_add_noise(latents, keys, alphas[timesteps], sigmas[timesteps])


def _same_noise(ours: Function, _: Function, inputs: Inputs) -> dict[str, float] | None:
    """The eager code draws noise of its own; to be compared it is given the kernel's."""

    def given(latents: Tensor, timesteps: Tensor, keys: Tensor, **_: Tensor) -> list[Tensor]:
        return eager.add_noise(latents, timesteps, philox_normal(keys, latents.shape[1:]))

    return compare(ours, given, inputs)


def paired_add_noise_cases(model: str, pairs: int) -> Iterator[Case]:
    latents = NETWORKS[model].latents
    elements = 2 * pairs * prod(latents)
    yield Case(
        kernel="paired_add_noise",
        model=model,
        pairs=pairs,
        shape=name_of((2 * pairs, *latents)),
        make_inputs=partial(_noise_inputs, model, pairs),
        ours=_add_noise,
        eager=lambda latents, timesteps, **_: eager.add_noise(latents, timesteps),
        bytes_forward=elements * 2 * BF16 + elements // 2 * FP32 + pairs * (KEY + 8),
        agreement=_same_noise,
    )
