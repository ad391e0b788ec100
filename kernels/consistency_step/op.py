"""Consistency-DPO between its networks: the solver step, then the targets of the loss.

For B pairs, x noisy at timestep t, α = √ᾱ_t, σ = √(1 − ᾱ_t), and α', σ' at the earlier t' that one
step of the solver leads to; winner and loser share t, t' and the guidance weight w. A prediction p
of a network at x holds clean latents and noise:

    x0 = (x − σ · p) / α      ε = p                      "epsilon"
    x0 = α · x − σ · p        ε = α · p + σ · x          "v_prediction"
    x0 = p                    ε = (x − α · p) / σ        "sample"

Solver step, DDIM without noise on the guided prediction. Guiding p guides x0 and ε alike, for both
are affine in p with weights that do not depend on it:

    p  = p_cond + w · (p_cond − p_uncond)
    x' = α' · x0(x, p) + σ' · ε(x, p)

Consistency functions, with s = timestep_scaling · t and d = sigma_data, are affine in p as well:

    c_skip = d² / (s² + d²)      c_out = s / √(s² + d²)
    f(x, t, p) = c_skip · x + c_out · x0(x, p) = a_t · x + b_t · p

What the policy's f(x, t, p) is held to, y, is so what its prediction is held to:

    f(x, t, p) − y = b_t · (p − q)      with q = (y − a_t · x) / b_t

The loss takes p, q and the slope b_t (`paired_dpo_loss`), and no consistency function is computed
of policy and reference. With y = f(x', t', p'), p' the frozen network's prediction at x', q is one
launch; with y the clean latents, it is what `paired_add_noise` writes beside the noisy ones.
At t = 0, a is 1 and b 0 exactly, f(x, 0) = x whatever p; q is 0 there.

All arithmetic is float32, each operation rounded once, so that PyTorch, the interpreter and a GPU
give the same bits; a and b are computed in float64 and rounded. A program takes one chunk of one
sample. Samples are walked in memory order, so NCHW and channels_last are both read as they lie.

Source: Song et al., arXiv 2303.01469; Luo et al., arXiv 2310.04378; DDIM: Song et al., arXiv
2010.02502; Croitoru et al., arXiv 2405.13637.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import (
    FLOATS,
    NO_FUSION,
    CompileSpec,
    check_choice,
    check_floating,
    check_pairs,
    check_per_pair,
    check_positive,
    check_same_device,
    compute_dtype,
    launch,
    takes_triton,
    triton,
)
from ..layout import empty_whole_samples, match_samples
from .programs import solver_kernel, targets_kernel
from .reference import solver_step, targets

PREDICTIONS = ("epsilon", "v_prediction", "sample")
MAX_BLOCK = 1024  # 8 elements a thread of 4 warps: 16-byte loads of half-precision values
NUM_WARPS = 4


class SchedulePoint(NamedTuple):
    """Where B pairs are on the noise schedule; winner and loser are at the same place."""

    timesteps: Tensor  # (B,) int64
    alpha: Tensor  # (B,) float32, √ᾱ_t, the factor of the clean latents
    sigma: Tensor  # (B,) float32, √(1 − ᾱ_t), the factor of the noise


class ConsistencyScales(NamedTuple):
    """The consistency function f = a · x + b · p of B pairs, x noisy latents, p a prediction."""

    of_noisy: Tensor  # (B,) a
    of_prediction: Tensor  # (B,) b


# --------------------------------------------------------------------------------------- launcher


def _block(num_elements: int) -> int:
    return int(min(max(triton.next_power_of_2(num_elements), 128), MAX_BLOCK))


def _launch(
    kernel: Any, out: Tensor, inputs: Sequence[Tensor], per_pair: Sequence[Tensor], **flags: Any
) -> None:
    """One program for each chunk of each sample, in the memory order of `out`'s samples."""
    matched = [match_samples(out, x)[1] for x in inputs]
    num_elements = out[0].numel()
    block = _block(num_elements)
    num_chunks = triton.cdiv(num_elements, block)
    launch(
        kernel,
        (out.shape[0] * num_chunks,),
        *matched,
        *(x.contiguous() for x in per_pair),
        out,
        out.shape[0] // 2,
        num_elements,
        num_chunks,
        *(x.stride(0) for x in matched),
        **flags,
        BLOCK=block,
        num_warps=max(block * NUM_WARPS // MAX_BLOCK, 1),
        **NO_FUSION,
    )


def compile_specs() -> list[CompileSpec]:
    """The specialisations that `benchmarks/compile_report.py` compiles without a GPU."""
    latents = ("teacher", "noisy", "previous", "prediction")
    factors = ["guidance", "alpha", "sigma", "earlier_alpha", "earlier_sigma"]
    factors += ["of_noisy", "of_prediction", "earlier_of_noisy", "earlier_of_prediction"]
    common = {f"{name}_ptr": "*fp32" for name in ("targets", *factors)}
    sizes = ("num_pairs", "num_elements", "num_chunks")
    common |= dict.fromkeys((*sizes, *(f"{name}_stride" for name in latents)), "i32")
    block = {"BLOCK": _block(4 * 96 * 96)}  # latents of an LCM at 768 pixels
    specs = []
    for dtype in ("bf16", "fp16", "fp32"):
        types = common | {f"{name}_ptr": f"*{dtype}" for name in latents}
        kinds: list[tuple[str, Any, dict[str, str]]] = [("targets", targets_kernel, {})]
        for prediction in PREDICTIONS if dtype == "bf16" else PREDICTIONS[:1]:
            kinds.append((f"solver {prediction}", solver_kernel, {"PREDICTION": prediction}))
        for part, kernel, flags in kinds:
            name = f"consistency_step {dtype} {part}"
            specs.append(CompileSpec(name, kernel, types, flags | block, NUM_WARPS))
    return specs


# ------------------------------------------------------------------------------------ torch.library


@torch.library.custom_op("cdpo::consistency_solver_step", mutates_args=())
def _solver_op(
    teacher: Tensor,
    noisy: Tensor,
    guidance: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    earlier_alpha: Tensor,
    earlier_sigma: Tensor,
    prediction: str,
    dtype: torch.dtype,
) -> Tensor:
    previous = empty_whole_samples(noisy, dtype)
    per_pair = (guidance, alpha, sigma, earlier_alpha, earlier_sigma)
    if not takes_triton(teacher, noisy):
        return previous.copy_(solver_step(teacher, noisy, *per_pair, prediction))
    _launch(solver_kernel, previous, (teacher, noisy), per_pair, PREDICTION=prediction)
    return previous


@_solver_op.register_fake
def _(teacher: Tensor, noisy: Tensor, *others: Any) -> Tensor:
    return empty_whole_samples(noisy, others[-1])


@torch.library.custom_op("cdpo::consistency_targets", mutates_args=())
def _targets_op(
    prediction: Tensor,
    previous: Tensor,
    noisy: Tensor,
    of_noisy: Tensor,
    of_prediction: Tensor,
    earlier_of_noisy: Tensor,
    earlier_of_prediction: Tensor,
) -> Tensor:
    latents = (prediction, previous, noisy)
    per_pair = (of_noisy, of_prediction, earlier_of_noisy, earlier_of_prediction)
    out = empty_whole_samples(prediction, compute_dtype(*latents))
    if not takes_triton(*latents):
        return out.copy_(targets(*latents, *per_pair))
    _launch(targets_kernel, out, latents, per_pair)
    return out


@_targets_op.register_fake
def _(prediction: Tensor, previous: Tensor, noisy: Tensor, *_: Any) -> Tensor:
    return empty_whole_samples(prediction, compute_dtype(prediction, previous, noisy))


# ----------------------------------------------------------------------------------------- public


def consistency_solver_step(
    teacher: Tensor,
    noisy: Tensor,
    guidance: Tensor,
    now: SchedulePoint,
    earlier: SchedulePoint,
    *,
    prediction: str = "epsilon",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """One guided DDIM step of the teacher, from `now` to `earlier`: previous (2B, ...).

    teacher: (4B, ...) predictions at noisy, conditional before unconditional, each
        `[winners; losers]`.
    noisy: (2B, ...) latents at `now`, `[winners; losers]`.
    guidance: (B,) float32, w of `cond + w (cond - uncond)`.
    prediction: what the teacher predicts: "epsilon", "v_prediction" or "sample".
    dtype: of previous; that of noisy if not given.

    teacher and noisy may be bf16, fp16 or fp32, also mixed. No gradient reaches any of them.
    Raises ValueError or TypeError that says what was given and what is taken.
    """
    dtype = dtype or noisy.dtype
    _check_solver(teacher, noisy, guidance, now, earlier, prediction, dtype)
    per_pair = (guidance, now.alpha, now.sigma, earlier.alpha, earlier.sigma)
    with torch.no_grad():
        previous: Tensor = _solver_op(teacher, noisy, *per_pair, prediction, dtype)
    return previous


def consistency_scales(
    point: SchedulePoint,
    *,
    prediction: str = "epsilon",
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> ConsistencyScales:
    """The function f(x, t, p) = a x + b p at points (B,), in float64: for tables of all timesteps.

    prediction: what the network predicts: "epsilon", "v_prediction" or "sample".
    timestep_scaling, sigma_data: of c_skip and c_out; diffusers' LCMScheduler has these defaults.
    Raises ValueError that says what was given and what is taken.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    check_positive(timestep_scaling=timestep_scaling, sigma_data=sigma_data)
    timesteps, alpha, sigma = (x.double() for x in point)
    s = timestep_scaling * timesteps
    total = s * s + sigma_data * sigma_data
    c_skip, c_out = sigma_data * sigma_data / total, s / total.sqrt()
    if prediction == "epsilon":
        return ConsistencyScales(c_skip + c_out / alpha, -c_out * sigma / alpha)
    if prediction == "v_prediction":
        return ConsistencyScales(c_skip + c_out * alpha, -c_out * sigma)
    return ConsistencyScales(c_skip, c_out)


def consistency_targets(
    prediction: Tensor,
    previous: Tensor,
    noisy: Tensor,
    now: ConsistencyScales,
    earlier: ConsistencyScales,
) -> Tensor:
    """What the policy's predictions at noisy are held to, (2B, ...) float32, or float64 if one is.

    prediction: (2B, ...) of the frozen network at previous (2B, ...), `[winners; losers]`.
    noisy: (2B, ...) latents that the policy predicts of.
    now, earlier: (B,) float32 each, the functions at noisy and at previous.

    For `paired_dpo_loss(policy, reference, targets, beta, distance="pseudo_huber",
    slopes=now.of_prediction)`. Inputs may be bf16, fp16 or fp32, also mixed. No gradient reaches
    any of them. Raises ValueError or TypeError that says what was given and what is taken.
    """
    _check_targets(prediction, previous, noisy, now, earlier)
    with torch.no_grad():
        found: Tensor = _targets_op(prediction, previous, noisy, *now, *earlier)
    return found


# ----------------------------------------------------------------------------------------- checks


def _check_solver(
    teacher: Tensor,
    noisy: Tensor,
    guidance: Tensor,
    now: SchedulePoint,
    earlier: SchedulePoint,
    prediction: str,
    dtype: torch.dtype,
) -> None:
    check_choice("prediction", prediction, PREDICTIONS)
    check_floating(teacher=teacher, noisy=noisy)
    if dtype not in FLOATS and dtype != noisy.dtype:
        raise TypeError(f"dtype is {dtype}; taken are bfloat16, float16 and float32")
    check_pairs("noisy is", noisy)
    wanted = (2 * noisy.shape[0], *noisy.shape[1:])
    if teacher.shape != wanted:
        raise ValueError(
            f"teacher is {tuple(teacher.shape)}; it must be {wanted}: conditional and "
            f"unconditional predictions for the {noisy.shape[0]} samples of noisy"
        )
    check_per_pair(noisy.shape[0] // 2, torch.float32, guidance=guidance)
    points = _check_points(noisy, now=now, earlier=earlier)
    check_same_device(teacher=teacher, noisy=noisy, guidance=guidance, **points)


def _check_targets(
    prediction: Tensor,
    previous: Tensor,
    noisy: Tensor,
    now: ConsistencyScales,
    earlier: ConsistencyScales,
) -> None:
    latents = {"prediction": prediction, "previous": previous, "noisy": noisy}
    check_floating(**latents)
    check_pairs("prediction is", prediction)
    shape = tuple(prediction.shape)
    for name, x in latents.items():
        if x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}; it must be {shape} like prediction")
    scales = _check_points(prediction, now=now, earlier=earlier)
    check_same_device(**latents, **scales)


def _check_points(
    samples: Tensor, **points: SchedulePoint | ConsistencyScales
) -> dict[str, Tensor]:
    """The points' tensors by name, each found to be one number for each pair of the samples."""
    named = {}
    for name, point in points.items():
        for field, tensor in point._asdict().items():
            dtype = torch.int64 if field == "timesteps" else torch.float32
            check_per_pair(samples.shape[0] // 2, dtype, **{f"{name}.{field}": tensor})
            named[f"{name}.{field}"] = tensor
    return named
