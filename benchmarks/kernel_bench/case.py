"""A case: one kernel at one shape, beside the eager code it stands for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from measuring.agreement import Function, Inputs, compare

DTYPE = torch.bfloat16  # of networks and latents; noise, targets and losses are float32
BF16, FP32 = 2, 4  # bytes of an element


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    All functions take the inputs as keyword arguments; a gradient is wanted for the inputs that
    require one, of the outputs that do. Bytes are counted from the shapes: what has to be read and
    written at the least, each tensor once. `agreement` raises Disagreement if `ours` and `eager`
    compute different things.
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
    agreement: Callable[[Function, Function, Inputs], Any] = compare


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
