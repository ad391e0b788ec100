"""Consistency-DPO between its networks: the solver step, then the consistency functions.

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

Consistency functions, with s = timestep_scaling · t and d = sigma_data:

    c_skip = d² / (s² + d²)      c_out = s / √(s² + d²)      f(x, t, p) = c_skip · x + c_out · x0
    policy, reference: f(x, t, ·)          target: f(x', t', ·)          ∂f/∂p = c_out · ∂x0/∂p

The networks force the break between the two; each is one launch. The backward needs the pairs'
numbers alone, for its slope is one scalar a pair. All arithmetic is float32, each operation rounded
once, so that PyTorch, the interpreter and a GPU give the same bits; equal predictions give equal
outputs. At t = 0, c_skip is 1 and c_out 0 exactly, so f(x, 0) = x.

Layout: a program takes one chunk of one sample and computes its pair's c_skip and c_out itself.
Samples are walked in memory order, so NCHW and channels_last are both read as they lie.

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
    as_float32,
    check_choice,
    check_floating,
    check_pairs,
    check_per_pair,
    check_positive,
    check_same_device,
    compute_dtype,
    device_of,
    takes_triton,
    triton,
)
from ..layout import empty_whole_samples, match_samples
from .programs import backward_kernel, outputs_kernel, solver_kernel
from .reference import consistency_function, consistency_gradient, solver_step

PREDICTIONS = ("epsilon", "v_prediction", "sample")
MAX_BLOCK = 1024  # 8 elements a thread of 4 warps: 16-byte loads of half-precision values
NUM_WARPS = 4


class SchedulePoint(NamedTuple):
    """Where B pairs are on the noise schedule; winner and loser are at the same place."""

    timesteps: Tensor  # (B,) int64
    alpha: Tensor  # (B,) float32, √ᾱ_t, the factor of the clean latents
    sigma: Tensor  # (B,) float32, √(1 − ᾱ_t), the factor of the noise


class ConsistencyOutputs(NamedTuple):
    """What `consistency_outputs` returns, (2B, ...) float32, unless an input was float64."""

    policy: Tensor  # differentiable in the policy's prediction
    reference: Tensor | None  # constant, as is the next; None if it was not given
    target: Tensor | None


# --------------------------------------------------------------------------------------- launcher


def _block(num_elements: int) -> int:
    return int(min(max(triton.next_power_of_2(num_elements), 128), MAX_BLOCK))


def _launch(
    kernel: Any, out: Tensor, inputs: Sequence[Tensor | None], others: Sequence[Any], **flags: Any
) -> None:
    """One program for each chunk of each sample, in the memory order of `out`'s samples."""
    matched = [x if x is None else match_samples(out, x)[1] for x in inputs]
    strides = [0 if x is None else x.stride(0) for x in matched]
    num_elements = out[0].numel()
    block = _block(num_elements)
    num_chunks = triton.cdiv(num_elements, block)
    with device_of(out):
        kernel[(out.shape[0] * num_chunks,)](
            *matched,
            *others,
            out.shape[0] // 2,
            num_elements,
            num_chunks,
            *strides,
            **flags,
            BLOCK=block,
            num_warps=max(block * NUM_WARPS // MAX_BLOCK, 1),
            **NO_FUSION,
        )


def compile_specs() -> list[CompileSpec]:
    """The specialisations that `benchmarks/compile_report.py` compiles without a GPU."""
    latents = ("teacher", "noisy", "previous", "policy", "reference", "target", "grad")
    outputs = ("policy_out", "reference_out", "target_out", "grad_output")
    factors = ("guidance", "alpha", "sigma", "earlier_alpha", "earlier_sigma")
    common = {f"{name}_ptr": "*fp32" for name in outputs + factors}
    common |= {"timesteps_ptr": "*i64", "earlier_timesteps_ptr": "*i64"}
    common |= {"timestep_scaling": "fp32", "sigma_data": "fp32"}
    sizes = ("num_pairs", "num_elements", "num_chunks", "grad_output_stride")
    common |= dict.fromkeys((*sizes, *(f"{name}_stride" for name in latents)), "i32")
    block = _block(4 * 96 * 96)  # latents of an LCM at 768 pixels
    kinds = [("bf16", prediction) for prediction in PREDICTIONS]
    specs = []
    for dtype, prediction in (*kinds, ("fp16", "epsilon"), ("fp32", "epsilon")):
        types = common | {f"{name}_ptr": f"*{dtype}" for name in latents}
        for part, kernel, reference in (
            ("solver", solver_kernel, False),
            ("outputs", outputs_kernel, True),
            ("outputs, cached", outputs_kernel, False),
            ("backward", backward_kernel, False),
        ):
            flags = {"REFERENCE": reference, "TARGET": True, "PREDICTION": prediction}
            name = f"consistency_step {dtype} {prediction} {part}"
            specs.append(CompileSpec(name, kernel, types, flags | {"BLOCK": block}, NUM_WARPS))
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
    others = [*(x.contiguous() for x in per_pair), previous]
    _launch(solver_kernel, previous, (teacher, noisy), others, PREDICTION=prediction)
    return previous


@_solver_op.register_fake
def _(teacher: Tensor, noisy: Tensor, *others: Any) -> Tensor:
    return empty_whole_samples(noisy, others[-1])


@torch.library.custom_op("cdpo::consistency_outputs", mutates_args=())
def _outputs_op(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor | None,
    noisy: Tensor,
    previous: Tensor | None,
    timesteps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    earlier_timesteps: Tensor | None,
    earlier_alpha: Tensor | None,
    earlier_sigma: Tensor | None,
    prediction: str,
    timestep_scaling: float,
    sigma_data: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (policy, reference, target, noisy, previous)
    outputs = _empty_outputs(*inputs)
    now = (timesteps, alpha, sigma)
    earlier = (earlier_timesteps, earlier_alpha, earlier_sigma)
    scalars = (as_float32(timestep_scaling), as_float32(sigma_data))
    if takes_triton(*_given(*inputs)):
        per_pair = [x if x is None else x.contiguous() for x in (*now, *earlier)]
        flags = {"REFERENCE": reference is not None, "TARGET": target is not None}
        others = (*per_pair, *outputs, *scalars)
        _launch(outputs_kernel, outputs[0], inputs, others, **flags, PREDICTION=prediction)
        return outputs
    places: Any = ((policy, noisy, now), (reference, noisy, now), (target, previous, earlier))
    for out, (output, x, point) in zip(outputs, places, strict=True):
        if output is not None:
            out.copy_(consistency_function(output, x, point, prediction, *scalars, out.dtype))
    return outputs


@_outputs_op.register_fake
def _(*inputs_and_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(*inputs_and_others[:5])


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _empty_outputs(policy: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs for policy, reference and target; of no size for one that is not given."""
    dtype = compute_dtype(*_given(policy, *others))
    reference, target = (
        policy.new_empty(0, dtype=dtype) if x is None else empty_whole_samples(policy, dtype)
        for x in others[:2]
    )
    return empty_whole_samples(policy, dtype), reference, target


@torch.library.custom_op("cdpo::consistency_outputs_backward", mutates_args=())
def _backward_op(
    grad_output: Tensor,
    timesteps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    prediction: str,
    timestep_scaling: float,
    sigma_data: float,
    dtype: torch.dtype,
) -> Tensor:
    grad = empty_whole_samples(grad_output, dtype)
    now = (timesteps, alpha, sigma)
    scalars = (as_float32(timestep_scaling), as_float32(sigma_data))
    if not takes_triton(grad_output):
        return grad.copy_(consistency_gradient(grad_output, now, prediction, *scalars))
    others = (*(x.contiguous() for x in now), grad, *scalars)
    _launch(backward_kernel, grad, (grad_output,), others, PREDICTION=prediction)
    return grad


@_backward_op.register_fake
def _(grad_output: Tensor, *others: Any) -> Tensor:
    return empty_whole_samples(grad_output, others[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, timesteps, alpha, sigma = inputs[0], *inputs[5:8]
    ctx.scalars, ctx.dtype = inputs[11:], policy.dtype
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the two that have no gradient
    ctx.save_for_backward(timesteps, alpha, sigma)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None,) * 14
    return _backward_op(grad_output, *ctx.saved_tensors, *ctx.scalars, ctx.dtype), *[None] * 13


_outputs_op.register_autograd(_backward, setup_context=_setup_context)


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


def consistency_outputs(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor | None,
    noisy: Tensor,
    previous: Tensor | None,
    now: SchedulePoint,
    earlier: SchedulePoint | None,
    *,
    prediction: str = "epsilon",
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
) -> ConsistencyOutputs:
    """The consistency functions of all three networks, `[winners; losers]` on the batch axis.

    policy, reference: (2B, ...) predictions at noisy (2B, ...), at `now`.
    target: (2B, ...) predictions at previous (2B, ...), at `earlier`.
    prediction: what all of them predict: "epsilon", "v_prediction" or "sample".
    timestep_scaling, sigma_data: of c_skip and c_out; diffusers' LCMScheduler has these defaults.

    reference may be None if its errors are cached; target, previous and earlier if the target is.
    The outputs are for `paired_dpo_loss(policy, reference, target, beta, distance="pseudo_huber")`.
    Inputs may be bf16, fp16 or fp32, also mixed. A gradient reaches the policy's prediction alone.
    Raises ValueError or TypeError that says what was given and what is taken.
    """
    scalars = (prediction, timestep_scaling, sigma_data)
    _check_outputs(policy, reference, target, noisy, previous, now, earlier, *scalars)
    points = (*now, *(earlier or (None, None, None)))
    f, r, y = _outputs_op(policy, reference, target, noisy, previous, *points, *scalars)
    return ConsistencyOutputs(f, None if reference is None else r, None if target is None else y)


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


def _check_outputs(
    policy: Tensor,
    reference: Tensor | None,
    target: Tensor | None,
    noisy: Tensor,
    previous: Tensor | None,
    now: SchedulePoint,
    earlier: SchedulePoint | None,
    prediction: str,
    timestep_scaling: float,
    sigma_data: float,
) -> None:
    check_choice("prediction", prediction, PREDICTIONS)
    check_positive(timestep_scaling=timestep_scaling, sigma_data=sigma_data)
    together = {"target": target, "previous": previous, "earlier": earlier}
    missing = [name for name, x in together.items() if x is None]
    if 0 < len(missing) < 3:
        raise ValueError(
            f"{' and '.join(missing)} is None; target, previous and earlier are given together or "
            "not at all"
        )
    optional = (("reference", reference), ("target", target), ("previous", previous))
    others = {"noisy": noisy, **{name: x for name, x in optional if x is not None}}
    check_floating(policy=policy, **others)
    check_pairs("policy is", policy)
    shape = tuple(policy.shape)
    for name, x in others.items():
        if x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}; it must be {shape} like policy")
    points = _check_points(policy, now=now, **({} if earlier is None else {"earlier": earlier}))
    check_same_device(policy=policy, **others, **points)


def _check_points(samples: Tensor, **points: SchedulePoint) -> dict[str, Tensor]:
    """The points' tensors by name, each found to be one number for each pair of the samples."""
    named = {}
    for name, point in points.items():
        for field, tensor in point._asdict().items():
            dtype = torch.int64 if field == "timesteps" else torch.float32
            check_per_pair(samples.shape[0] // 2, dtype, **{f"{name}.{field}": tensor})
            named[f"{name}.{field}"] = tensor
    return named
