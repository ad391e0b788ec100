"""GEGLU: `hidden · gelu(gate)` of one projection's two halves, one launch forward, one backward.

    out     = hidden · gate · Φ(gate)              Φ the normal distribution, by erf: the exact GELU
    ∂hidden = ∂out · gate · Φ(gate)
    ∂gate   = ∂out · hidden · (Φ(gate) + gate · φ(gate))         φ the normal density

Eager PyTorch writes the GELU and reads it again, and keeps both halves and the GELU for the
backward; here the projection alone is kept, and Φ is computed again. The halves are read in place:
a row of the projection holds hidden, then gate. All arithmetic is float32, so a half-precision
result is rounded once, not twice.

Φ(−|gate|) is one polynomial under `exp2` (`elementary.py`), which serves Φ of either sign; the
density is another `exp2`.

Layout: a program takes BLOCK neighbouring elements of one row of the output.

Source: Shazeer, arXiv 2002.05202; Hendrycks and Gimpel, arXiv 1606.08415.
"""

# Triton functions have no Python types:
# mypy: allow-untyped-defs, allow-incomplete-defs

import functools
from typing import Any

import torch
from torch import Tensor

from .dispatch import (
    NO_FUSION,
    CompileSpec,
    check_floating,
    is_differentiated,
    is_traced,
    launch,
    takes_triton,
    tl,
    triton,
)
from .elementary import normal_tail

MAX_BLOCK = 1024  # 16 elements a thread of 2 warps, in 16-byte loads of half-precision values

# ---------------------------------------------------------------------------------------- forward


@triton.jit
def _halves(projected_ptr, width, BLOCK: tl.constexpr):
    """This program's hidden and gate in float32, with the offset of the hidden and the mask."""
    num_blocks = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    offset = row * 2 * width + column
    hidden = tl.load(projected_ptr + offset, mask, 0.0).to(tl.float32)
    gate = tl.load(projected_ptr + offset + width, mask, 0.0).to(tl.float32)
    return hidden, gate, row * width + column, offset, mask


@triton.jit
def _forward_kernel(projected_ptr, out_ptr, width, BLOCK: tl.constexpr):
    hidden, gate, out_offset, _, mask = _halves(projected_ptr, width, BLOCK)
    # gate · Φ(gate): with Φ(-|gate|), which keeps its digits in the tail, of gates of either sign
    activated = tl.fma(-tl.abs(gate), normal_tail(gate), tl.where(gate < 0.0, 0.0, gate))
    tl.store(out_ptr + out_offset, hidden * activated, mask)


# --------------------------------------------------------------------------------------- backward


@triton.jit
def _backward_kernel(grad_ptr, projected_ptr, grad_projected_ptr, width, BLOCK: tl.constexpr):
    hidden, gate, out_offset, offset, mask = _halves(projected_ptr, width, BLOCK)
    grad = tl.load(grad_ptr + out_offset, mask, 0.0).to(tl.float32)
    tail = normal_tail(gate)
    distribution = tl.where(gate < 0.0, tail, 1.0 - tail)
    # exp2's argument carries the factor of the density, 1 / √2π
    density = tl.exp2(tl.fma(gate * gate, -0.7213475204444817, -1.3257480647361593))
    grad_gate = grad * hidden * tl.fma(gate, density, distribution)
    tl.store(grad_projected_ptr + offset, grad * (gate * distribution), mask)
    tl.store(grad_projected_ptr + offset + width, grad_gate, mask)


# --------------------------------------------------------------------------------------- launcher


@functools.cache
def _cut(elements: int, width: int) -> tuple[tuple[int], dict[str, Any]]:
    """Programs for so many elements of an output so wide, and what they are compiled for."""
    block = min(max(triton.next_power_of_2(width), 128), MAX_BLOCK)
    grid = (elements // width * triton.cdiv(width, block),)
    return grid, {"BLOCK": block, "num_warps": max(block * 2 // MAX_BLOCK, 1), **NO_FUSION}


def _forward_triton(projected: Tensor) -> Tensor:
    out = _empty_output(projected)
    width = out.shape[-1]
    grid, constants = _cut(out.numel(), width)
    launch(_forward_kernel, grid, projected.contiguous(), out, width, **constants)
    return out


def _backward_triton(grad: Tensor, projected: Tensor) -> Tensor:
    grad_projected, width = projected.new_empty(projected.shape), grad.shape[-1]
    grid, constants = _cut(grad.numel(), width)
    tensors = (grad.contiguous(), projected.contiguous(), grad_projected)
    launch(_backward_kernel, grid, *tensors, width, **constants)
    return grad_projected


def compile_specs() -> list[CompileSpec]:
    """The specialisations that `benchmarks/compile_report.py` compiles without a GPU."""
    names = ("projected_ptr", "out_ptr", "grad_ptr", "grad_projected_ptr")
    return [
        CompileSpec(
            f"geglu {dtype} {part}",
            kernel,
            {"width": "i32"} | dict.fromkeys(names, f"*{dtype}"),
            {"BLOCK": MAX_BLOCK},
            2,
        )
        for dtype in ("bf16", "fp16", "fp32")
        for part, kernel in (("forward", _forward_kernel), ("backward", _backward_kernel))
    ]


# ------------------------------------------------------------------------------------ torch.library


def _empty_output(projected: Tensor) -> Tensor:
    return projected.new_empty((*projected.shape[:-1], projected.shape[-1] // 2))


@torch.library.custom_op("cdpo::geglu", mutates_args=())
def _op(projected: Tensor) -> Tensor:
    return _forward(projected)


def _forward(projected: Tensor) -> Tensor:
    if takes_triton(projected):
        return _forward_triton(projected)
    return geglu_ref(projected).contiguous()


@_op.register_fake
def _(projected: Tensor) -> Tensor:
    return _empty_output(projected)


@torch.library.custom_op("cdpo::geglu_backward", mutates_args=())
def _backward_op(grad: Tensor, projected: Tensor) -> Tensor:
    return _gradient(grad, projected)


def _gradient(grad: Tensor, projected: Tensor) -> Tensor:
    if takes_triton(projected, grad):
        return _backward_triton(grad, projected)
    return _backward_torch(grad, projected)


@_backward_op.register_fake
def _(grad: Tensor, projected: Tensor) -> Tensor:
    return projected.new_empty(projected.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    grad_projected: Tensor = _backward_op(grad, *ctx.saved_tensors)
    return grad_projected


_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same without the dispatcher, for what only runs."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        return _forward(projected)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled() or is_traced(grad):
            return _backward(ctx, grad)
        return _gradient(grad, *ctx.saved_tensors)


# ----------------------------------------------------------------------------------------- public


def geglu(projected: Tensor) -> Tensor:
    """`hidden * gelu(gate)` with `hidden, gate = projected.chunk(2, -1)`, in projected's dtype.

    projected: (..., 2D) bf16, fp16 or fp32 -> (..., D). Raises ValueError or TypeError that says
    what was given and what is taken.
    """
    _check(projected)
    if is_traced(projected):
        run: Any = _op
    else:
        run = _Eager.apply if is_differentiated(projected) else _forward
    out: Tensor = run(projected)
    return out


def _check(projected: Tensor) -> None:
    check_floating(projected=projected)
    if projected.ndim < 1 or projected.numel() == 0 or projected.shape[-1] % 2:
        raise ValueError(
            f"projected is {tuple(projected.shape)}; it must be (..., 2D), no size zero: hidden "
            "and gate, equally wide"
        )


# -------------------------------------------------------------------------------------- reference


def geglu_ref(projected: Tensor) -> Tensor:
    """The same in plain PyTorch, differentiated by PyTorch."""
    hidden, gate = _wide(projected).chunk(2, -1)
    return (hidden * torch.nn.functional.gelu(gate)).to(projected.dtype)


def _backward_torch(grad: Tensor, projected: Tensor) -> Tensor:
    hidden, gate = _wide(projected).chunk(2, -1)
    grad = grad.to(hidden.dtype)
    distribution = 0.5 * (1 + torch.erf(gate * 0.5**0.5))
    density = torch.exp(-0.5 * gate * gate) * (2 * torch.pi) ** -0.5
    grad_gate = grad * hidden * (distribution + gate * density)
    grads = torch.cat([grad * (gate * distribution), grad_gate], -1)
    return grads.to(projected.dtype).contiguous()


def _wide(projected: Tensor) -> Tensor:
    return projected if projected.dtype == torch.float64 else projected.float()
