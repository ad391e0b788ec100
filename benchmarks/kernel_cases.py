"""The registry: each kernel at the shapes of real models, beside the eager code it stands for.

A kernel takes part by one function here, which yields its cases at one model and batch, and by its
line in FAMILIES. Bytes are counted from the shapes: what has to be read and written at the least,
each tensor once.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import eager_baselines as eager
import torch
from agreement import Function, Inputs, compare, compare_distributions
from cdpo.kernels import geglu, group_norm_silu, paired_add_noise, paired_dpo_loss, philox_normal
from single_launch_loss import single_launch_loss
from torch import Tensor
from unet_layers import NETWORKS, GegluCall, GroupNormCall, layer_calls

BATCHES = (1, 2, 4, 8, 16, 32, 64)  # pairs
LAYER_BATCHES = (1, 8, 64)  # a UNet has some twenty shapes, each compiled anew for each batch
BETA, CONSISTENCY_BETA, HUBER_C = 5000.0, 200.0, 1e-3
DTYPE = torch.bfloat16  # of networks and latents; noise and targets are float32
BF16, FP32, KEY = 2, 4, 32  # bytes of an element, and of a pair's key


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    All functions take the inputs as keyword arguments; a gradient is wanted for the inputs that
    require one. `agreement` raises Disagreement if `ours` and `eager` compute different things.
    """

    kernel: str
    model: str
    pairs: int
    shape: str
    make_inputs: Callable[[torch.device], Inputs]
    ours: Function
    eager: Function
    bytes_forward: int
    bytes_backward: int = 0  # 0 where nothing is differentiated
    count: int = 1  # how often a UNet's forward runs it
    others: Mapping[str, Function] = field(default_factory=dict)  # further baselines
    needs_gpu: bool = False
    agreement: Callable[[Function, Function, Inputs], Any] = compare


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


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
    results = (1 + pairs + 4 * pairs) * FP32  # loss, logits, errors of policy and reference
    return Case(
        kernel=name,
        model=model,
        pairs=pairs,
        shape=_name((2 * pairs, *latents)),
        make_inputs=partial(_predictions, model, pairs, distance, cached),
        ours=ours,
        eager=eager_loss,
        bytes_forward=elements * BF16 + reference + target + results,
        bytes_backward=elements * BF16 + target + elements * BF16 + (1 + pairs) * FP32,
        **more,
    )


def _mse_loss(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    return paired_dpo_loss(policy, reference, target, BETA / 2).loss


def _huber_loss(policy: Tensor, reference: Tensor, target: Tensor) -> Tensor:
    return paired_dpo_loss(
        policy, reference, target, CONSISTENCY_BETA, distance="pseudo_huber", huber_c=HUBER_C
    ).loss


def _loss_cases(model: str, pairs: int) -> Iterator[Case]:
    case = partial(_loss_case, model=model, pairs=pairs)
    diffusion = partial(eager.diffusion_dpo_loss, scale=BETA / 2)
    cached = partial(eager.cached_dpo_loss, scale=BETA / 2)
    huber = partial(eager.consistency_dpo_loss, scale=CONSISTENCY_BETA, huber_c=HUBER_C)
    yield case("paired_dpo_loss", ours=_mse_loss, eager_loss=diffusion)
    yield case("paired_dpo_loss cached", ours=_mse_loss, eager_loss=cached, cached=True)
    yield case(
        "paired_dpo_loss pseudo_huber", ours=_huber_loss, eager_loss=huber, distance="pseudo_huber"
    )
    yield case(
        "paired_dpo_loss single launch (study)",
        ours=partial(single_launch_loss, scale=BETA / 2),
        eager_loss=diffusion,
        others={
            "two launches": _mse_loss,
            "scaled in backward": partial(single_launch_loss, scale=BETA / 2, upstream_known=False),
        },
        needs_gpu=True,
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


def _philox_cases(model: str, pairs: int) -> Iterator[Case]:
    latents = NETWORKS[model].latents
    yield Case(
        kernel="philox_normal",
        model=model,
        pairs=pairs,
        shape=_name((pairs, *latents)),
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


def _add_noise_cases(model: str, pairs: int) -> Iterator[Case]:
    latents = NETWORKS[model].latents
    elements = 2 * pairs * prod(latents)
    yield Case(
        kernel="paired_add_noise",
        model=model,
        pairs=pairs,
        shape=_name((2 * pairs, *latents)),
        make_inputs=partial(_noise_inputs, model, pairs),
        ours=_add_noise,
        eager=lambda latents, timesteps, **_: eager.add_noise(latents, timesteps),
        bytes_forward=elements * 2 * BF16 + elements // 2 * FP32 + pairs * (KEY + 8),
        agreement=_same_noise,
    )


# ----------------------------------------------------------------------------- layers of the UNet


def _layers(model: str, kind: type) -> list[tuple[Any, int]]:
    return [(call, count) for call, count in layer_calls(model).items() if isinstance(call, kind)]


def _group_norm_case(model: str, pairs: int, call: GroupNormCall, count: int) -> Case:
    shape = (2 * pairs, call.channels, call.height, call.width)

    def make_inputs(device: torch.device) -> dict[str, Tensor]:
        x = (torch.randn(shape, device=device) + 0.5).to(DTYPE)
        return {
            "x": x.to(memory_format=torch.channels_last).requires_grad_(),
            "weight": (1 + 0.1 * torch.randn(call.channels, device=device)).to(DTYPE),
            "bias": (0.1 * torch.randn(call.channels, device=device)).to(DTYPE),
        }

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, call.num_groups, weight, bias, call.eps, silu=call.silu)

    baseline = eager.group_norm_silu if call.silu else eager.group_norm
    parameters = 2 * call.channels * BF16
    return Case(
        kernel="group_norm_silu",
        model=model,
        pairs=pairs,
        shape=_name(shape) + " SiLU" * call.silu,
        make_inputs=make_inputs,
        ours=ours,
        eager=partial(baseline, num_groups=call.num_groups, eps=call.eps),
        bytes_forward=2 * prod(shape) * BF16 + parameters,
        bytes_backward=3 * prod(shape) * BF16 + parameters,
        count=count,
    )


def _group_norm_cases(model: str, pairs: int) -> Iterator[Case]:
    """Frozen weights, as under LoRA: the gradient is that of x alone."""
    for call, count in _layers(model, GroupNormCall):
        yield _group_norm_case(model, pairs, call, count)


def _geglu_case(model: str, pairs: int, call: GegluCall, count: int) -> Case:
    shape = (2 * pairs, call.tokens, 2 * call.width)
    half = prod(shape) // 2 * BF16
    return Case(
        kernel="geglu",
        model=model,
        pairs=pairs,
        shape=_name(shape),
        make_inputs=lambda device: {
            "projected": torch.randn(shape, device=device).to(DTYPE).requires_grad_()
        },
        ours=geglu,
        eager=eager.geglu,
        bytes_forward=3 * half,
        bytes_backward=5 * half,
        count=count,
    )


def _geglu_cases(model: str, pairs: int) -> Iterator[Case]:
    for call, count in _layers(model, GegluCall):
        yield _geglu_case(model, pairs, call, count)


# ------------------------------------------------------------------------------------- registry

Family = Callable[[str, int], Iterator[Case]]  # (model, pairs) -> cases
FAMILIES: dict[Family, tuple[int, ...]] = {  # with the batches it runs at
    _loss_cases: BATCHES,
    _philox_cases: BATCHES,
    _add_noise_cases: BATCHES,
    _group_norm_cases: LAYER_BATCHES,
    _geglu_cases: LAYER_BATCHES,
}


def cases(models: list[str], batches: list[int] | None, kernels: str, gpu: bool) -> list[Case]:
    """The cases of all kernels whose name contains `kernels`, that can run here."""
    found = [
        case
        for family, usual in FAMILIES.items()
        for model in models
        for pairs in batches or usual
        for case in family(model, pairs)
        if kernels in case.kernel and (gpu or not case.needs_gpu)
    ]
    names = list(dict.fromkeys(case.kernel for case in found))
    return sorted(found, key=lambda case: names.index(case.kernel))
