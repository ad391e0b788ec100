"""A study: the DPO loss and its gradient in one launch, the residuals staying in registers.

    python benchmarks/single_launch_loss.py        compiles it, without a GPU: registers, spills

`cdpo.kernels.paired_dpo_loss` takes two launches: forward and backward each read policy and target.
Here one program holds a whole pair: it reduces policy, reference and target to the logit and then,
from the residuals that it kept, writes the gradient at once. What that needs: a pair that fits
into the registers of one program, and an upstream gradient that is known before the backward
(1/accumulation steps, fp16 loss scale); without the latter the backward scales what was written.

Mean squared errors only, and samples must be contiguous. It stands here and not in `kernels/`, for
it is kept only if it is faster; LOG.md says what is known.
"""

import argparse
import sys
from typing import Any

import torch
from cdpo.kernels.dispatch import (
    INTERPRETED,
    NO_FUSION,
    CompileSpec,
    device_of,
    tl,
    triton,
    zero_tickets,
)

# Device functions of the two-launch loss, so that both compute with the same arithmetic.
from cdpo.kernels.paired_dpo_programs import _difference_terms, _mean_loss
from rich.console import Console
from torch import Tensor

MAX_WARPS = 32
ELEMENTS_A_THREAD = 16  # of each residual; fewer for small samples, more where 32 warps are too few
SAMPLES = {"SD1.5@512": 4 * 64 * 64, "LCM@768": 4 * 96 * 96, "SDXL@1024": 4 * 128 * 128}


@triton.jit
def _read_sample(policy_ptr, reference_ptr, target_ptr, mask):
    """Of one sample: the residual, and the sums of policy error, reference error and difference."""
    p = tl.load(policy_ptr, mask, 0.0).to(tl.float32)
    r = tl.load(reference_ptr, mask, 0.0).to(tl.float32)
    t = tl.load(target_ptr, mask, 0.0).to(tl.float32)
    policy_term, reference_term, difference = _difference_terms(p, r, t, 0.0, False)
    return p - t, tl.sum(policy_term), tl.sum(reference_term), tl.sum(difference)


@triton.jit
def single_launch_kernel(
    policy_ptr,
    reference_ptr,
    target_ptr,
    tickets_ptr,  # (1,) int32, 0
    loss_ptr,
    logits_ptr,
    policy_error_ptr,
    reference_error_ptr,
    grad_ptr,
    scale,
    upstream,
    num_elements,
    SHARED: tl.constexpr,  # one target for winner and loser
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIR_TILES: tl.constexpr,
):
    """One pair; the program that draws the last ticket writes the mean loss."""
    num_pairs = tl.num_programs(0)
    winner = tl.program_id(0).to(tl.int64)
    loser = winner + num_pairs
    offset = tl.arange(0, BLOCK)
    mask = offset < num_elements
    at_w = winner * num_elements + offset
    at_l = loser * num_elements + offset
    target_at_l = at_w if SHARED else at_l

    # The second read of a shared target comes from a cache.
    x_w, policy_w, reference_w, gain_w = _read_sample(
        policy_ptr + at_w, reference_ptr + at_w, target_ptr + at_w, mask
    )
    x_l, policy_l, reference_l, gain_l = _read_sample(
        policy_ptr + at_l, reference_ptr + at_l, target_ptr + target_at_l, mask
    )
    logit = -scale * ((gain_w - gain_l) / num_elements)
    weight = upstream * scale / (1.0 + tl.exp(logit)) / num_pairs / num_elements
    tl.store(grad_ptr + at_w, 2.0 * weight * x_w, mask)
    tl.store(grad_ptr + at_l, -2.0 * weight * x_l, mask)

    tl.store(logits_ptr + winner, logit)
    tl.store(policy_error_ptr + winner, policy_w / num_elements)
    tl.store(policy_error_ptr + loser, policy_l / num_elements)
    tl.store(reference_error_ptr + winner, reference_w / num_elements)
    tl.store(reference_error_ptr + loser, reference_l / num_elements)
    # The barrier puts the stores of all threads before the ticket, which publishes them.
    tl.debug_barrier()
    if tl.atomic_add(tickets_ptr, 1, sem="acq_rel") == num_pairs - 1:
        tl.store(tickets_ptr, 0)
        _mean_loss(logits_ptr, loss_ptr, num_pairs, PAIRS, PAIR_TILES)


def num_warps(block: int) -> int:
    return min(max(block // (32 * ELEMENTS_A_THREAD), 1), MAX_WARPS)


def _constants(num_pairs: int, num_elements: int) -> dict[str, int]:
    pairs = min(triton.next_power_of_2(num_pairs), 512)
    return {
        "BLOCK": triton.next_power_of_2(num_elements),
        "PAIRS": pairs,
        "PAIR_TILES": triton.cdiv(num_pairs, pairs),
    }


def launch(
    policy: Tensor, reference: Tensor, target: Tensor, scale: float, upstream: float = 1.0
) -> tuple[Tensor, ...]:
    """(loss, logits, policy_error, reference_error, gradient), shapes as `paired_dpo_loss`'s.

    policy, reference: (2B, ...); target: (B, ...) or (2B, ...); all contiguous.
    upstream: the gradient of what is differentiated with respect to this loss.
    """
    num_pairs, num_elements = policy.shape[0] // 2, policy[0].numel()
    loss = policy.new_empty((), dtype=torch.float32)
    logits = loss.new_empty(num_pairs)
    policy_error, reference_error = loss.new_empty(2 * num_pairs), loss.new_empty(2 * num_pairs)
    grad = torch.empty_like(policy)
    constants = _constants(num_pairs, num_elements)
    with device_of(policy):
        single_launch_kernel[(num_pairs,)](
            policy,
            reference,
            target,
            zero_tickets(1, policy.device),
            loss,
            logits,
            policy_error,
            reference_error,
            grad,
            scale,
            upstream,
            num_elements,
            SHARED=target.shape[0] == num_pairs,
            **constants,
            num_warps=num_warps(constants["BLOCK"]),
            **NO_FUSION,
        )
    return loss, logits, policy_error, reference_error, grad


class _SingleLaunch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, policy: Tensor, *arguments: Any) -> Tensor:
        *arguments, ctx.upstream_known = arguments
        loss, *_, ctx.grad = launch(policy, *arguments)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad = ctx.grad if ctx.upstream_known else ctx.grad.mul_(grad_loss)
        return grad, *[None] * 5


def single_launch_loss(
    policy: Tensor,
    reference: Tensor,
    target: Tensor,
    scale: float,
    upstream: float = 1.0,
    upstream_known: bool = True,
) -> Tensor:
    """The loss, differentiable once in policy.

    upstream_known: the backward takes `upstream` for its gradient, and has nothing left to do.
    Otherwise it multiplies what the forward wrote, with `upstream` 1, by the gradient it gets.
    """
    return _SingleLaunch.apply(policy, reference, target, scale, upstream, upstream_known)


def compile_specs() -> list[CompileSpec]:
    pointers = ("loss", "logits", "policy_error", "reference_error")
    signature = {f"{name}_ptr": "*fp32" for name in pointers} | {"target_ptr": "*fp32"}
    signature |= dict.fromkeys(("policy_ptr", "reference_ptr", "grad_ptr"), "*bf16")
    signature |= {"tickets_ptr": "*i32", "num_elements": "i32", "scale": "fp32", "upstream": "fp32"}
    specs = []
    for model, num_elements in SAMPLES.items():
        constants = {"SHARED": True, **_constants(64, num_elements)}
        for warps in (MAX_WARPS // 2, MAX_WARPS):
            name = f"{model}, n = {num_elements}, {warps} warps"
            specs.append(CompileSpec(name, single_launch_kernel, signature, constants, warps))
    return specs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100])
    options = parser.parse_args()
    if INTERPRETED:
        print("TRITON_INTERPRET is set: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    from compile_report import compile_spec, show  # here, for it turns the interpreter off

    rows = [compile_spec(spec, sm) for spec in compile_specs() for sm in options.sm]
    Console(width=None if sys.stdout.isatty() else 150).print(show(rows, options.sm))
    return 0


if __name__ == "__main__":
    sys.exit(main())
