"""GroupNorm with optional SiLU on channels-last tensors: two launches forward, two backward.

For sample n, channel c of group g, m elements in a group of a sample:

    x̂   = (x − mean_ng) · rstd_ng           rstd = 1 / √(variance + eps), variance over m, biased
    z   = x̂ · weight_c + bias_c
    out = z · σ(z)                          or z itself without SiLU

    ∂z  = ∂out · σ(z) · (1 + z · (1 − σ(z)))
    ∂x  = rstd · (weight_c · ∂z − (Σ weight·∂z + x̂ · Σ weight·∂z·x̂) / m)     sums over the group
    ∂weight_c = Σ ∂z · x̂      ∂bias_c = Σ ∂z                                 sums over n and space

Eager PyTorch copies a channels-last tensor to NCHW first, normalises it, writes it, reads it for
the SiLU, writes it again, and the next convolution copies it back; between the passes it keeps the
input of both. Here x is read twice and the output written once, and only x is kept: x̂ and z are
computed again in the backward.

Layout: a sample is a matrix of rows (positions) and channels. A program walks a chunk of rows for
a block of channels and leaves, for each channel, the chunk's mean and its sum of squared deviations
from that mean. Each lane sums distances, and their squares, from the first value that it meets, so
that nothing large cancels (never E[x²] − E[x]²): as that value is among those summed, the squares
are at most n + 1 times the squared deviations of n values. Channels are the fast axis of memory, so
loads are wide whatever the number of channels in a group. The program that draws a sample's last
ticket puts the chunks of all its groups together in a fixed order (Chan et al.; no float atomics:
bitwise deterministic). Chunks depend on the size of a sample alone, so a sample's result does not
depend on the batch it is in. All arithmetic is float32.

Source: Wu and He, arXiv 1803.08494; Chan, Golub, LeVeque 1983.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import (
    NO_FUSION,
    CompileSpec,
    check_floating,
    check_same_device,
    compute_dtype,
    is_differentiated,
    is_traced,
    launch,
    takes_triton,
    triton,
    zero_tickets,
)
from .programs import (
    backward_apply_kernel,
    backward_sums_kernel,
    forward_apply_kernel,
    forward_statistics_kernel,
)

BLOCK_CHANNELS = 64  # 128 bytes of a row: one cache line of half-precision values
WARP_ROWS = 8  # of a warp: 16 elements a thread, in 16-byte loads of half-precision values
NUM_WARPS = 4
SUMS_TILES = 8  # of a program at least; what a program does once is shared by so many
APPLY_TILES = (4, 2, 1)  # the first that makes enough programs
PROGRAMS = 132  # enough: the multiprocessors of an H200
CHUNKS = 256  # of rows and channels of a sample at most; its last program puts them together
COMBINED = 16  # values of each of them that a thread holds then

# --------------------------------------------------------------------------------------- launcher


def _to_rows(x: Tensor) -> Tensor:
    """(N, C, ...) as a dense (N, ..., C): a view of a channels-last tensor, else a copy."""
    return x.movedim(1, -1).contiguous()


def _empty_rows(x: Tensor) -> Tensor:
    """Uninitialised tensor like x, (N, C, ...), channels last in memory."""
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)


class _Cut(NamedTuple):
    """How samples are cut; for sums by their own size alone, so that they do not know the batch."""

    partials: tuple[int, int, int, int]  # samples, chunks of a sample, two sums, channels
    sums_grid: tuple[int]
    sums_sizes: tuple[int, int]  # rows of a sample, of a chunk
    sums: dict[str, Any]  # options of the kernels that add up
    apply_grid: tuple[int]
    num_rows: int
    apply: dict[str, Any]  # of those that write a tensor like x


@functools.cache
def _cut(samples: int, channels: int, num_rows: int, num_groups: int) -> _Cut:
    block = min(triton.next_power_of_2(channels), BLOCK_CHANNELS)
    blocks, padded_rows = triton.cdiv(channels, block), triton.next_power_of_2(num_rows)

    def options(warps: int, tiles: int = 1) -> dict[str, Any]:
        rows = min(padded_rows, warps * WARP_ROWS * tiles)
        whole = channels % block == 0 and num_rows % rows == 0
        num_warps = max(rows // tiles * block // (WARP_ROWS * BLOCK_CHANNELS), 1)
        sizes = {"CHANNELS": channels, "GROUPS": num_groups, "BLOCK_C": block, "TILE_ROWS": rows}
        return {**sizes, "WHOLE": whole, "num_warps": num_warps, **NO_FUSION}

    # Where a sample has few rows, only as many warps as have enough of them
    least = WARP_ROWS * SUMS_TILES
    sums = options(next(n for n in (NUM_WARPS, 2, 1) if n == 1 or num_rows >= n * least))
    tiles = triton.cdiv(num_rows, sums["TILE_ROWS"])
    most_chunks = min(triton.cdiv(tiles, SUMS_TILES), max(CHUNKS // blocks, 1))
    chunk_rows = sums["TILE_ROWS"] * triton.cdiv(tiles, most_chunks)
    num_chunks = triton.cdiv(num_rows, chunk_rows)
    sums["GROUPS_TILE"] = min(triton.next_power_of_2(num_groups), 32)
    sums["FLAT_TILE"] = COMBINED * 32 * sums["num_warps"] // sums["GROUPS_TILE"]

    for tiles in APPLY_TILES:
        apply = options(NUM_WARPS, tiles)
        programs = samples * blocks * triton.cdiv(num_rows, apply["TILE_ROWS"])
        if programs >= PROGRAMS:
            break
    return _Cut(
        (samples, num_chunks, 2, channels),
        (samples * num_chunks * blocks,),
        (num_rows, chunk_rows),
        sums,
        (programs,),
        num_rows,
        apply,
    )


def _cut_of(x: Tensor, num_groups: int) -> _Cut:
    samples, channels = x.shape[:2]
    return _cut(samples, channels, x.numel() // (samples * channels), num_groups)


def _forward_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, out, cut = _to_rows(x), _empty_rows(x), _cut_of(x, num_groups)
    mean = x.new_empty((x.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    partials = x.new_empty(cut.partials, dtype=torch.float32)
    tickets = zero_tickets(x.shape[0], x.device)
    affine, flags = _contiguous(weight, bias), {"AFFINE": weight is not None, "SILU": silu}
    arguments: tuple[Any, ...] = (rows, partials, tickets, mean, rstd, eps, *cut.sums_sizes)
    launch(forward_statistics_kernel, cut.sums_grid, *arguments, **cut.sums)
    arguments = (rows, *affine, mean, rstd, out, cut.num_rows)
    launch(forward_apply_kernel, cut.apply_grid, *arguments, **flags, **cut.apply)
    return out, mean, rstd


def _backward_triton(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    affine_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, cut = _empty_rows(x), _cut_of(x, mean.shape[1])
    partials = x.new_empty(cut.partials, dtype=torch.float32)
    group_sums = mean.new_empty((*mean.shape, 2))
    tickets = zero_tickets(x.shape[0], x.device)
    inputs = (_to_rows(grad), _to_rows(x), *_contiguous(weight, bias), mean, rstd)
    flags = {"AFFINE": weight is not None, "SILU": silu}
    arguments: tuple[Any, ...] = (*inputs, partials, tickets, group_sums, *cut.sums_sizes)
    launch(backward_sums_kernel, cut.sums_grid, *arguments, **flags, **cut.sums)
    arguments = (*inputs, group_sums, grad_x, cut.num_rows)
    launch(backward_apply_kernel, cut.apply_grid, *arguments, **flags, **cut.apply)
    if not affine_grads or weight is None or bias is None:
        return grad_x, grad.new_empty(0), grad.new_empty(0)
    # Some hundredths of x: a kernel of our own would gain nothing over PyTorch's sums.
    grad_bias, grad_weight = (sums.sum((0, 1)) for sums in partials.unbind(2))
    return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)


def _contiguous(weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if weight is None or bias is None:
        return None, None
    return weight.contiguous(), bias.contiguous()


def compile_specs() -> list[CompileSpec]:
    """The specialisations that `benchmarks/compile_report.py` compiles without a GPU."""
    float32 = ("partials", "mean", "rstd", "group_sums")
    common = {f"{name}_ptr": "*fp32" for name in float32} | {"tickets_ptr": "*i32", "eps": "fp32"}
    common |= dict.fromkeys(("num_rows", "chunk_rows"), "i32")
    cut, specs = _cut(1, 320, 4096, 32), []
    for dtype, silu in itertools.product(("bf16", "fp16", "fp32"), (True, False)):
        names = ("x_ptr", "grad_ptr", "out_ptr", "grad_x_ptr", "weight_ptr", "bias_ptr")
        signature = common | dict.fromkeys(names, f"*{dtype}")
        kernels = [("apply", forward_apply_kernel, cut.apply)]
        kernels += [("backward sums", backward_sums_kernel, cut.sums)]
        kernels += [("backward apply", backward_apply_kernel, cut.apply)]
        if silu:  # the statistics know of no activation
            kernels.insert(0, ("statistics", forward_statistics_kernel, cut.sums))
        specs += [
            CompileSpec(
                f"group_norm_silu {dtype} {part}{'' if silu else ', no SiLU'}",
                kernel,
                signature,
                options | {"AFFINE": True, "SILU": silu},
                options["num_warps"],
            )
            for part, kernel, options in kernels
        ]
    return specs


# ------------------------------------------------------------------------------------ torch.library


@torch.library.custom_op("cdpo::group_norm_silu", mutates_args=())
def _op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, weight, bias, num_groups, eps, silu)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    run = _forward_triton if takes_triton(x) else _forward_torch
    return run(x, weight, bias, num_groups, eps, silu)


@_op.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], num_groups), dtype=compute_dtype(x))
    return _empty_rows(x), mean, torch.empty_like(mean)


@torch.library.custom_op("cdpo::group_norm_silu_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    affine_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(grad, x, weight, bias, mean, rstd, silu, affine_grads)


def _gradients(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    run: Any = _backward_triton if takes_triton(x, grad) else _backward_torch
    grads: tuple[Tensor, Tensor, Tensor] = run(grad, x, *others)
    return grads


@_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not others[-1] or weight is None or bias is None:
        return _empty_rows(x), grad.new_empty(0), grad.new_empty(0)
    return _empty_rows(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # zeros for them would be two launches
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return _backward_by(_backward_op, ctx, grad)


def _backward_by(gradients: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Frozen weights, the usual case under LoRA, cost no sums.
    affine_grads = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    # Saved tensors are asked for once: activation checkpointing gives them a single time.
    grads = gradients(grad, *ctx.saved_tensors, ctx.silu, affine_grads)
    return grads[0], *(grads[1:] if affine_grads else (None, None)), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)


class _Eager(torch.autograd.Function):
    """The same without the dispatcher, for what only runs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Any, num_groups: int, eps: float, silu: bool
    ) -> Tensor:
        out, mean, rstd = _forward(x, weight, bias, num_groups, eps, silu)
        ctx.silu = silu
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or is_traced(grad):
            return _backward(ctx, grad)
        return _backward_by(_gradients, ctx, grad)


# ----------------------------------------------------------------------------------------- public


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
) -> Tensor:
    """`silu(group_norm(x))`, or `group_norm(x)` alone with `silu=False`; x's shape and dtype.

    x: (N, C, ...) bf16, fp16 or fp32. The output lies channels-last in memory; an input that does
    not is copied, so put the network there: `unet.to(memory_format=torch.channels_last)`.
    num_groups: divides C.
    weight, bias: (C,) both or neither; they may be of another floating dtype than x.
    eps: added to the variance.

    A non-finite element makes its own group of its own sample NaN. Raises ValueError or TypeError
    that says what was given and what is taken.
    """
    _check(x, num_groups, weight, bias, eps)
    arguments = (x, weight, bias, num_groups, eps, silu)
    if is_traced(x):
        out: Tensor = _op(*arguments)[0]
    elif is_differentiated(x, weight, bias):
        out = _Eager.apply(*arguments)
    else:
        out = _forward(*arguments)[0]
    return out


def _check(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias come together: give both or neither")
    affine = {} if weight is None or bias is None else {"weight": weight, "bias": bias}
    check_floating(x=x, **affine)
    check_same_device(x=x, **affine)
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(f"x is {tuple(x.shape)}; it must be (N, C, ...), no size zero")
    channels = x.shape[1]
    if not 1 <= num_groups <= channels or channels % num_groups:
        raise ValueError(
            f"num_groups is {num_groups} for {channels} channels; it must divide the channels"
        )
    for name, parameter in affine.items():
        if parameter.shape != (channels,):
            raise ValueError(f"{name} is {tuple(parameter.shape)}; it must be ({channels},)")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps is {eps}; it must be finite and not negative")


# -------------------------------------------------------------------------------------- reference


def _forward_torch(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = _by_group(x, num_groups)
    # Not F.group_norm, which takes E[x²] − E[x]² of channels-last tensors on a CPU.
    variance, mean = torch.var_mean(groups, 2, correction=0)
    rstd = 1 / (variance + eps).sqrt()
    z = ((groups - mean[..., None]) * rstd[..., None]).view(x.shape)
    z = z * _per_channel(weight, z) + _per_channel(bias, z) if weight is not None else z
    out = F.silu(z) if silu else z
    return _to_rows(out.to(x.dtype)).movedim(-1, 1), mean, rstd


def _backward_torch(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
    affine_grads: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    num_groups = mean.shape[1]
    groups = (_by_group(x, num_groups) - mean[..., None]) * rstd[..., None]
    normalised = groups.view(x.shape)
    grad_z = grad.to(normalised.dtype)
    scale = 1 if weight is None else _per_channel(weight, normalised)
    if silu:
        z = normalised * scale + (0 if bias is None else _per_channel(bias, normalised))
        sigmoid = z.sigmoid()
        grad_z = grad_z * (sigmoid * (1 + z * (1 - sigmoid)))
    scaled = _by_group(scale * grad_z, num_groups)
    plain_mean = scaled.mean(2, keepdim=True)
    projected_mean = (scaled * groups).mean(2, keepdim=True)
    grad_x = (scaled - (plain_mean + groups * projected_mean)) * rstd[..., None]
    grad_x = _to_rows(grad_x.view(x.shape).to(x.dtype)).movedim(-1, 1)
    if not affine_grads or weight is None or bias is None:
        return grad_x, grad.new_empty(0), grad.new_empty(0)
    others = [dim for dim in range(x.ndim) if dim != 1]
    grad_weight = (grad_z * normalised).sum(others)
    return grad_x, grad_weight.to(weight.dtype), grad_z.sum(others).to(bias.dtype)


def _by_group(x: Tensor, num_groups: int) -> Tensor:
    """(N, C, ...) as (N, G, elements of a group), float32 or float64."""
    return x.to(compute_dtype(x)).reshape(x.shape[0], num_groups, -1)


def _per_channel(parameter: Tensor | None, like: Tensor) -> Tensor:
    assert parameter is not None
    return parameter.to(like.dtype).view(-1, *[1] * (like.ndim - 2))
