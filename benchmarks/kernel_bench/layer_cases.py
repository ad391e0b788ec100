"""Kernels inside the UNet, at every shape that one of its forwards runs them at."""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from cdpo.kernels import geglu, group_norm_silu
from kernel_bench import eager_baselines as eager
from kernel_bench.case import BF16, DTYPE, Case, name_of
from kernel_bench.unet_layers import GegluCall, GroupNormCall, layer_calls
from torch import Tensor


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
        shape=name_of(shape) + " SiLU" * call.silu,
        make_inputs=make_inputs,
        ours=ours,
        eager=partial(baseline, num_groups=call.num_groups, eps=call.eps),
        bytes_forward=2 * prod(shape) * BF16 + parameters,
        bytes_backward=3 * prod(shape) * BF16 + parameters,
        count=count,
    )


def group_norm_silu_cases(model: str, pairs: int) -> Iterator[Case]:
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
        shape=name_of(shape),
        make_inputs=lambda device: {
            "projected": torch.randn(shape, device=device).to(DTYPE).requires_grad_()
        },
        ours=geglu,
        eager=eager.geglu,
        bytes_forward=3 * half,
        bytes_backward=5 * half,
        count=count,
    )


def geglu_cases(model: str, pairs: int) -> Iterator[Case]:
    for call, count in _layers(model, GegluCall):
        yield _geglu_case(model, pairs, call, count)
