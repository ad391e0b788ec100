"""Paired DPO loss: both errors, the logit, the log-sigmoid and the mean in one launch each way.

For B pairs, winners first, x = s · (prediction − target) and n elements in a sample, with a slope s
and a weight w of each pair, 1 if not given, and a share κ of the loser's gradient:

    e(x)   = 1/n Σ x²                                        distance "mse"
    e(x)   = 1/n Σ √(x² + c²) − c                            distance "pseudo_huber"
    logit  = −scale · w · [(e_w^policy − e_w^ref) − (e_l^policy − e_l^ref)]
    loss   = −1/B Σ log σ(logit)
    ∂loss/∂policy_w = + scale · w · σ(−logit) · s · e'(x_w) / B
    ∂loss/∂policy_l = − κ · the same of x_l                  (κ: see `differences.py`)

A slope makes x the error of what is affine in a prediction, as consistency functions are: the loss
of those takes predictions, too (`consistency_step`).

If the reference is given as predictions r, the policy-minus-reference difference is accumulated
itself: s² Σ (p − r)(p + r − 2t) for MSE, the same over √(x_p² + c²) + √(x_r² + c²) for
pseudo-Huber. Identical networks then give logit 0 and loss log 2 exactly; subtracting two rounded
means gives logits up to 2.2 at β = 5000 in fp16. The pseudo-Huber error is evaluated as
x²/(√(x² + c²) + c), the same number without the cancellation.

Layout: a program reduces one chunk of one pair, winner and loser together, so that a shared target
is read once. It stores its sums and draws a ticket; the program that draws a pair's last ticket
adds the chunks in a fixed order (no float atomics: bitwise deterministic) and writes the pair's
results, and the one that finishes the last pair writes the mean. The chunk size depends on n alone,
so a pair's logit does not depend on the batch it is in. Sums are trees in float32; only the mean
over pairs is in float64, which makes B equal losses average to that loss exactly. The backward
needs the logits and κ, nothing else of the forward. Samples are walked in memory order, so NCHW and
channels_last are both read as they lie.

Source: Wallace et al., arXiv 2311.12908; Croitoru et al., arXiv 2405.13637.
"""

import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import (
    NO_FUSION,
    CompileSpec,
    compute_dtype,
    launch,
    takes_triton,
    triton,
    zero_tickets,
)
from ..layout import empty_samples, match_samples, sample_strides
from .differences import DISTANCES, Comparison, check_comparison, differences, residuals
from .programs import backward_kernel, forward_kernel

MAX_BLOCK = 2048  # 8 elements a thread of 8 warps: 16-byte loads of half-precision inputs
MAX_WARPS = 8
MAX_TILE = 512  # chunks or pairs that are added at a time


class PairedLoss(NamedTuple):
    """What `paired_dpo_loss` returns; float32, unless an input was float64."""

    loss: Tensor  # (), differentiable in policy
    logits: Tensor  # (B,), detached, as are the next two
    policy_error: Tensor  # (2B,)
    reference_error: Tensor  # (2B,)
    loser_kept: Tensor  # (B,) κ, the share of the loser's gradient


# --------------------------------------------------------------------------------------- launcher


def _block(num_elements: int) -> int:
    return int(min(max(triton.next_power_of_2(num_elements), 128), MAX_BLOCK))


def _num_warps(block: int) -> int:
    return max(block * MAX_WARPS // MAX_BLOCK, 1)


def _forward_constants(num_pairs: int, num_elements: int) -> dict[str, int]:
    block = _block(num_elements)
    num_chunks = triton.cdiv(num_elements, block)
    chunks = min(triton.next_power_of_2(num_chunks), MAX_TILE)
    pairs = min(triton.next_power_of_2(num_pairs), MAX_TILE)
    return {
        "BLOCK": block,
        "CHUNKS": chunks,
        "CHUNK_TILES": triton.cdiv(num_chunks, chunks),
        "PAIRS": pairs,
        "PAIR_TILES": triton.cdiv(num_pairs, pairs),
    }


def _forward_triton(
    policy: Tensor, reference: Tensor, target: Tensor, how: Comparison
) -> PairedLoss:
    cached = reference.ndim == 1
    if cached:
        policy, target = match_samples(policy, target)
        reference = reference.contiguous()
    else:
        policy, reference, target = match_samples(policy, reference, target)
    num_pairs, num_elements = policy.shape[0] // 2, policy[0].numel()
    block = _block(num_elements)
    num_chunks = triton.cdiv(num_elements, block)
    sums = (2 if cached else 5) + 2 * (how.safeguard is not None)
    partials = policy.new_empty((sums, num_pairs, num_chunks), dtype=torch.float32)
    outputs = _empty_outputs(policy, torch.float32)
    launch(
        forward_kernel,
        (num_pairs, num_chunks),
        policy,
        reference,
        target,
        *_contiguous(how.slopes, how.weights),
        partials,
        zero_tickets(1 + num_pairs, policy.device),
        *outputs,
        how.scale,
        how.huber_c,
        how.loser_gradient,
        1 - (how.safeguard or 0.0),
        num_elements,
        policy.stride(0),
        reference.stride(0),
        target.stride(0),
        HUBER=how.is_huber,
        CACHED=cached,
        SHARED=target.shape[0] == num_pairs,
        SLOPES=how.slopes is not None,
        WEIGHTS=how.weights is not None,
        SAFEGUARD=how.safeguard is not None,
        **_forward_constants(num_pairs, num_elements),
        num_warps=_num_warps(block),
        **NO_FUSION,
    )
    return outputs


def _backward_triton(
    grad_loss: Tensor,
    logits: Tensor,
    loser_kept: Tensor,
    policy: Tensor,
    target: Tensor,
    how: Comparison,
) -> Tensor:
    grad = torch.empty_like(policy)
    policy, target = match_samples(policy, target)
    direct = sample_strides(grad) == sample_strides(policy)
    written = grad if direct else empty_samples(grad, policy)
    num_pairs, num_elements = policy.shape[0] // 2, policy[0].numel()
    block = _block(num_elements)
    launch(
        backward_kernel,
        (num_pairs, triton.cdiv(num_elements, block)),
        grad_loss,
        logits,
        loser_kept,
        policy,
        target,
        *_contiguous(how.slopes, how.weights),
        written,
        how.scale,
        how.huber_c,
        num_elements,
        policy.stride(0),
        target.stride(0),
        written.stride(0),
        HUBER=how.is_huber,
        SHARED=target.shape[0] == num_pairs,
        SLOPES=how.slopes is not None,
        WEIGHTS=how.weights is not None,
        BLOCK=block,
        num_warps=_num_warps(block),
        **NO_FUSION,
    )
    return grad if direct else grad.copy_(written)


def _contiguous(*numbers: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in numbers]


def compile_specs() -> list[CompileSpec]:
    """The specialisations that `benchmarks/compile_report.py` compiles without a GPU."""
    float32 = ["loss", "logits", "policy_error", "reference_error", "partials", "grad_loss"]
    float32 += ["slopes", "weights", "loser_kept"]
    common = {f"{name}_ptr": "*fp32" for name in float32} | {"tickets_ptr": "*i32"}
    common |= dict.fromkeys(("scale", "huber_c", "loser_gradient", "given_up"), "fp32")
    common |= {"num_elements": "i32"}
    common |= {f"{name}_stride": "i32" for name in ("policy", "reference", "target", "grad")}
    constants = {"SHARED": False, **_forward_constants(64, 4 * 128 * 128)}
    plain = dict.fromkeys(("SLOPES", "WEIGHTS", "SAFEGUARD"), False)
    whole = dict.fromkeys(plain, True) | {"CACHED": False}
    specs = []
    for dtype, distance in itertools.product(("bf16", "fp16", "fp32"), DISTANCES):
        types = common | dict.fromkeys(("policy_ptr", "target_ptr", "grad_ptr"), f"*{dtype}")
        flags = constants | {"HUBER": distance == "pseudo_huber"}
        name = f"paired_dpo_loss {dtype} {distance}"
        for suffix, kernel, more, reference in (
            ("forward", forward_kernel, plain | {"CACHED": False}, f"*{dtype}"),
            ("forward, cached", forward_kernel, plain | {"CACHED": True}, "*fp32"),
            ("forward, safeguard", forward_kernel, whole, f"*{dtype}"),
            ("backward", backward_kernel, plain, ""),
            ("backward, weights", backward_kernel, whole, ""),
        ):
            signature = types | {"reference_ptr": reference}
            specs.append(
                CompileSpec(f"{name} {suffix}", kernel, signature, flags | more, MAX_WARPS)
            )
    return specs


# ------------------------------------------------------------------------------------ torch.library


def _empty_outputs(policy: Tensor, dtype: torch.dtype) -> PairedLoss:
    batch = policy.shape[0]
    loss = policy.new_empty((), dtype=dtype)
    logits, loser_kept = (policy.new_empty((batch // 2,), dtype=dtype) for _ in range(2))
    policy_error, reference_error = (policy.new_empty((batch,), dtype=dtype) for _ in range(2))
    return PairedLoss(loss, logits, policy_error, reference_error, loser_kept)


@torch.library.custom_op("cdpo::paired_dpo_loss", mutates_args=())
def _op(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    slopes: Tensor | None,
    weights: Tensor | None,
    scale: float,
    distance: str,
    huber_c: float,
    loser_gradient: float,
    safeguard: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    run = _forward_triton if takes_triton(policy, reference, target) else paired_dpo_loss_ref
    how = Comparison(slopes, weights, scale, distance, huber_c, loser_gradient, safeguard)
    loss, logits, policy_error, reference_error, loser_kept = run(
        policy, reference, target, how.rounded()
    )
    return loss, logits, policy_error, reference_error, loser_kept


@_op.register_fake
def _(
    policy: Tensor, reference: Tensor, target: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_outputs(policy, compute_dtype(policy, reference, target))


@torch.library.custom_op("cdpo::paired_dpo_loss_backward", mutates_args=())
def _backward_op(
    grad_loss: Tensor,
    logits: Tensor,
    loser_kept: Tensor,
    policy: Tensor,
    target: Tensor,
    slopes: Tensor | None,
    weights: Tensor | None,
    scale: float,
    distance: str,
    huber_c: float,
) -> Tensor:
    run = _backward_triton if takes_triton(policy, target, logits) else _backward_torch
    how = Comparison(slopes, weights, scale, distance, huber_c, 1.0, None)  # κ is in loser_kept
    return run(grad_loss, logits, loser_kept, policy, target, how.rounded())


@_backward_op.register_fake
def _(grad_loss: Tensor, logits: Tensor, loser_kept: Tensor, policy: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(policy)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    policy, _, target, slopes, weights, *scalars = inputs
    _, logits, policy_error, reference_error, loser_kept = output
    ctx.scalars = scalars[:3]
    ctx.mark_non_differentiable(logits, policy_error, reference_error, loser_kept)
    ctx.set_materialize_grads(False)  # zeros for them would be four launches
    ctx.save_for_backward(logits, loser_kept, policy, target, slopes, weights)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    return _backward_op(grad_loss, *ctx.saved_tensors, *ctx.scalars), *[None] * 9


_op.register_autograd(_backward, setup_context=_setup_context)


# ----------------------------------------------------------------------------------------- public


def paired_dpo_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    scale: float,
    *,
    distance: str = "mse",
    huber_c: float = 1e-3,
    slopes: Tensor | None = None,
    weights: Tensor | None = None,
    loser_gradient: float = 1.0,
    safeguard: float | None = None,
) -> PairedLoss:
    """DPO loss of B pairs of predictions, `[winners; losers]` on the batch axis.

    policy: (2B, ...) predictions of the network in training.
    reference: (2B, ...) predictions of the frozen network, or its (2B,) float32 errors.
    target: (B, ...) shared by winner and loser, or (2B, ...).
    scale: beta/2 for Diffusion-DPO, beta for Consistency-DPO; used as float32.
    distance: "mse" or "pseudo_huber" with constant huber_c.
    slopes: (B,) float32, factors of prediction − target; 1 if not given.
    weights: (B,) float32, factors of the logits; 1 if not given.
    loser_gradient: share of the loser's gradient that is kept, from 0 to 1.
    safeguard: share, from 0 to 1, of what the winner gains without the loser that the loser's
        gradient has to leave it; none if not given.

    Inputs may be bf16, fp16 or fp32, also mixed. All but policy are constants: no gradient reaches
    them. A non-finite input makes its own pair's logit non-finite: NaN makes the mean loss NaN, and
    an infinite loser gives the logit +inf and the loss 0, of which the gradient alone shows it.
    Raises ValueError or TypeError that says what was given and what is taken.
    """
    how = Comparison(slopes, weights, scale, distance, huber_c, loser_gradient, safeguard)
    check_comparison(policy, reference, target, how)
    return PairedLoss(*_op(policy, reference, target, *how))


# -------------------------------------------------------------------------------------- reference


def paired_dpo_loss_ref(
    policy: Tensor, reference: Tensor, target: Tensor, how: Comparison
) -> PairedLoss:
    """The same in plain PyTorch, differentiated by PyTorch."""
    found = differences(policy, reference, target, how)
    logits = -how.scale * found.margin
    if how.weights is not None:
        logits = how.weights.to(logits.dtype) * logits
    loss = -F.logsigmoid(logits).double().mean().to(logits.dtype)
    return PairedLoss(loss, logits.detach(), *found[1:])


def _backward_torch(
    grad_loss: Tensor,
    logits: Tensor,
    loser_kept: Tensor,
    policy: Tensor,
    target: Tensor,
    how: Comparison,
) -> Tensor:
    x, slope = residuals(policy.to(logits.dtype), target.to(logits.dtype), how.slopes)
    pull = x / (x * x + how.huber_c * how.huber_c).sqrt() if how.is_huber else 2 * x
    weight = grad_loss * how.scale * torch.sigmoid(-logits) / logits.numel() / policy[0].numel()
    if how.weights is not None:
        weight = how.weights.to(logits.dtype) * weight
    weight = torch.cat([weight, -loser_kept * weight]).view(-1, *[1] * (policy.ndim - 1))
    return torch.empty_like(policy).copy_(weight * slope * pull)
