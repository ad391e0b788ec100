"""Noise for pairs: drawn from keys, added to winner and loser alike, target written, in one launch.

With n ~ N(0, 1) the float32 normals of `philox_normal`, one field a pair, and a pair's α and σ:

    noisy  = α · latent + σ · n           DDPM: α = √ᾱ_t, σ = √(1 − ᾱ_t)     flow: α = 1 − t, σ = t
    target = n                            "epsilon", one for winner and loser
    target = α · n − σ · latent           "v_prediction"
    target = n − latent                   "flow", the velocity
    target = latent                       "sample"
    target = a · latent + b · n           "affine", with a pair's factors a and b

Unfused, this reads and writes the noise three times and the latents twice; here the noise stays in
registers. All arithmetic is float32, each product and sum rounded once, so that PyTorch, the
interpreter and a GPU give the same bits.

Layout: a program makes the noise of 4·BLOCK neighbouring elements of one pair. Elements are counted
in logical (row-major) order, so a pair has the same noise in NCHW and in channels_last; for the
latter the kernel goes from the logical to the memory position itself.

Source: Ho et al., arXiv 2006.11239; v: Salimans and Ho, arXiv 2202.00512; flow: Lipman et al.,
arXiv 2210.02747.
"""

# Triton functions have no Python types:
# mypy: allow-untyped-defs, allow-incomplete-defs

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import (
    FLOATS,
    NO_FUSION,
    CompileSpec,
    check_choice,
    check_pairs,
    check_per_pair,
    check_same_device,
    launch,
    takes_triton,
    tl,
    triton,
)
from .philox import check_key_range, check_keys, philox_normal_ref, philox_normals

MAX_BLOCK = 256  # counters a program; 8 elements a thread of 4 warps
TARGETS = ("epsilon", "v_prediction", "flow", "sample", "affine")


# ---------------------------------------------------------------------------------------- forward


@triton.jit
def _target(latent, noise, alpha, sigma, of_latent, of_noise, TARGET: tl.constexpr):
    if TARGET == "v_prediction":
        return alpha * noise - sigma * latent
    elif TARGET == "affine":
        return of_latent * latent + of_noise * noise
    elif TARGET == "flow":
        return noise - latent
    else:
        return latent


@triton.jit
def _add_noise_kernel(
    latents_ptr,
    keys_ptr,
    alpha_ptr,
    sigma_ptr,
    of_latent_ptr,  # None unless TARGET is "affine", as is the next
    of_noise_ptr,
    noisy_ptr,
    target_ptr,
    num_elements,
    channels,
    area,  # elements of one channel
    TARGET: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    noise = philox_normals(keys_ptr, pair, counter.to(tl.uint32))
    element = tl.program_id(1) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    mask = element < num_elements
    if CHANNELS_LAST:
        element = element % area * channels + element // area
    winner = pair * num_elements
    loser = winner + tl.num_programs(0).to(tl.int64) * num_elements

    alpha = tl.load(alpha_ptr + pair)
    sigma = tl.load(sigma_ptr + pair)
    latent_w = tl.load(latents_ptr + winner + element, mask, 0.0).to(tl.float32)
    latent_l = tl.load(latents_ptr + loser + element, mask, 0.0).to(tl.float32)
    tl.store(noisy_ptr + winner + element, alpha * latent_w + sigma * noise, mask)
    tl.store(noisy_ptr + loser + element, alpha * latent_l + sigma * noise, mask)
    if TARGET == "epsilon":
        tl.store(target_ptr + winner + element, noise, mask)
    else:
        of_latent = tl.load(of_latent_ptr + pair) if TARGET == "affine" else 0.0
        of_noise = tl.load(of_noise_ptr + pair) if TARGET == "affine" else 0.0
        target_w = _target(latent_w, noise, alpha, sigma, of_latent, of_noise, TARGET)
        target_l = _target(latent_l, noise, alpha, sigma, of_latent, of_noise, TARGET)
        tl.store(target_ptr + winner + element, target_w, mask)
        tl.store(target_ptr + loser + element, target_l, mask)


# --------------------------------------------------------------------------------------- launcher


def _add_noise_triton(
    latents: Tensor,
    keys: Tensor,
    per_pair: Sequence[Tensor | None],
    target: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    noisy, target_out = _empty_outputs(latents, target, dtype)
    num_pairs, num_elements, channels = latents.shape[0] // 2, latents[0].numel(), latents.shape[1]
    block = min(triton.next_power_of_2(triton.cdiv(num_elements, 4)), MAX_BLOCK)
    launch(
        _add_noise_kernel,
        (num_pairs, triton.cdiv(num_elements, 4 * block)),
        latents,
        keys.contiguous(),
        *(x if x is None else x.contiguous() for x in per_pair),
        noisy,
        target_out,
        num_elements,
        channels,
        num_elements // channels,
        TARGET=target,
        CHANNELS_LAST=not latents.is_contiguous(),
        BLOCK=block,
        num_warps=max(block // 64, 1),
        **NO_FUSION,
    )
    return noisy, target_out


def compile_specs() -> list[CompileSpec]:
    """The specialisations that `benchmarks/compile_report.py` compiles without a GPU."""
    specs = []
    sizes = dict.fromkeys(("num_elements", "channels", "area"), "i32")
    pointers = {"keys_ptr": "*i64"} | dict.fromkeys(("alpha_ptr", "sigma_ptr"), "*fp32")
    pointers |= dict.fromkeys(("target_ptr", "of_latent_ptr", "of_noise_ptr"), "*fp32")
    for dtype, last in itertools.product(("bf16", "fp16", "fp32"), (False, True)):
        types = sizes | pointers | dict.fromkeys(("latents_ptr", "noisy_ptr"), f"*{dtype}")
        target = "affine" if last else "epsilon"
        flags = {"TARGET": target, "CHANNELS_LAST": last, "BLOCK": MAX_BLOCK}
        name = f"paired_add_noise {dtype} {target}{', channels_last' * last}"
        specs.append(CompileSpec(name, _add_noise_kernel, types, flags, MAX_BLOCK // 64))
    return specs


# ------------------------------------------------------------------------------------ torch.library


def _empty_outputs(latents: Tensor, target: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    like = latents[: latents.shape[0] // 2] if target == "epsilon" else latents
    plain = latents.is_contiguous()
    memory_format = torch.contiguous_format if plain else torch.channels_last
    return (
        torch.empty_like(latents, dtype=dtype, memory_format=memory_format),
        torch.empty_like(like, dtype=torch.float32, memory_format=memory_format),
    )


@torch.library.custom_op("cdpo::paired_add_noise", mutates_args=())
def _op(
    latents: Tensor,
    keys: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    of_latent: Tensor | None,
    of_noise: Tensor | None,
    target: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if not keys.is_cuda:  # on CUDA a look at the values would wait for the device
        check_key_range(keys)
    if takes_triton(latents):
        return _add_noise_triton(latents, keys, (alpha, sigma, of_latent, of_noise), target, dtype)
    outputs = _empty_outputs(latents, target, dtype)
    factors = None if of_latent is None or of_noise is None else (of_latent, of_noise)
    values = paired_add_noise_ref(latents, keys, alpha, sigma, target, factors)
    for out, value in zip(outputs, values, strict=True):
        out.copy_(value)
    return outputs


@_op.register_fake
def _(latents: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(latents, *others[-2:])


# ----------------------------------------------------------------------------------------- public


def paired_add_noise(
    latents: Tensor,
    keys: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    target: str = "epsilon",
    factors: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Corrupt B pairs, `[winners; losers]` on the batch axis: (noisy (2B, ...), target).

    latents: (2B, ...) bf16, fp16 or fp32.
    keys: int64 (B, 4), one a pair, as `philox_normal` takes them.
    alpha, sigma: (B,) float32, factors of the latents and of the noise.
    target: "epsilon" gives the noise (B, ...); the others (2B, ...).
    factors: (B,) float32 each, of the latents and of the noise, for the target "affine" alone.
    dtype: of noisy; that of the latents if not given. The target is float32.

    The outputs have the latents' memory format, NCHW or channels_last; latents that lie otherwise
    are made contiguous first.
    """
    dtype = dtype or latents.dtype
    _check(latents, keys, alpha, sigma, target, factors, dtype)
    if not (latents.is_contiguous() or _is_channels_last(latents)):
        latents = latents.contiguous()
    noisy, target_out = _op(latents, keys, alpha, sigma, *(factors or (None, None)), target, dtype)
    return noisy, target_out


def _is_channels_last(latents: Tensor) -> bool:
    return latents.ndim == 4 and latents.is_contiguous(memory_format=torch.channels_last)


def _check(
    latents: Tensor,
    keys: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    target: str,
    factors: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> None:
    for name, given in (("latents are", latents.dtype), ("dtype is", dtype)):
        if given not in FLOATS:
            raise TypeError(f"{name} {given}; taken are bfloat16, float16 and float32")
    check_keys(keys)
    check_choice("target", target, TARGETS)
    if (factors is not None) != (target == "affine"):
        raise ValueError(f"factors are for target='affine' and needed there; it is {target!r}")
    per_pair = {"alpha": alpha, "sigma": sigma}
    if factors is not None:
        per_pair |= {"factors of the latents": factors[0], "factors of the noise": factors[1]}
    check_same_device(latents=latents, keys=keys, **per_pair)
    check_pairs("latents are", latents)
    pairs = latents.shape[0] // 2
    if keys.shape[0] != pairs:
        raise ValueError(f"there are {keys.shape[0]} keys for {pairs} pairs; each pair has one")
    check_per_pair(pairs, torch.float32, **per_pair)


# -------------------------------------------------------------------------------------- reference


def paired_add_noise_ref(
    latents: Tensor,
    keys: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    target: str,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, both in float32."""
    noise = philox_normal_ref(keys, latents.shape[1:])
    both, x = torch.cat([noise, noise]), latents.float()
    alpha, sigma = _columns(latents, alpha, sigma)
    noisy = alpha * x + sigma * both
    if target == "epsilon":
        return noisy, noise
    if target == "v_prediction":
        return noisy, alpha * both - sigma * x
    if factors is not None:
        of_latent, of_noise = _columns(latents, *factors)
        return noisy, of_latent * x + of_noise * both
    return noisy, both - x if target == "flow" else x


def _columns(latents: Tensor, *numbers: Tensor) -> list[Tensor]:
    """One number a pair, for winner and loser, broadcast over their elements."""
    return [torch.cat([x, x]).view(-1, *[1] * (latents.ndim - 1)) for x in numbers]
