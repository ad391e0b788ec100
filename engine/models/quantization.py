"""A frozen base in fewer bits: the weights of linear layers, as diffusers' quantisers make them.

======  ==============  ==========================================================================
kind    made by         a weight is
======  ==============  ==========================================================================
`nf4`   bitsandbytes    one of 16 quantiles of a normal distribution, times a scale of 64 weights
`int8`  torchao         one of 255 integers, times a scale of its row
`fp8`   torchao         a float of 8 bits (e4m3), times a scale of its row
======  ==============  ==========================================================================

They are those of `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` and of
`TorchAoConfig` with `Int8WeightOnlyConfig()` or `Float8WeightOnlyConfig()`; scales are float32. NF4
is Dettmers et al.'s, arXiv 2305.14314, as is the way to train on it.

The product with them is ours: the weights of one layer are made whole for it, forward and backward,
and nothing of them is kept in between. So policy and reference compute alike to the bit, on every
device. torchao's own layers keep all whole weights for the backward pass, and on a CPU bitsandbytes
puts weights that both share into another order when the reference is asked.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..basics.errors import OutsideError

Kind = Literal["nf4", "int8", "fp8"]
LIBRARIES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
BLOCK = 64  # weights of NF4 that share a scale
FLOAT32 = 4


def refuse_missing_library(kind: Kind) -> None:
    """OutsideError, kind `not-installed`, unless weights can be quantised here."""
    if importlib.util.find_spec(LIBRARIES[kind]) is None:
        raise OutsideError(
            f"model.quantization={kind} needs {LIBRARIES[kind]}, which is not installed: "
            "pip install 'cdpo[quantization]', or leave it out",
            "model.quantization",
            "not-installed",
        )


@dataclass(frozen=True)
class Quantized:
    """What of a network is, or would be, in fewer bits."""

    kind: Kind
    weights: int
    """Of all linear layers."""
    whole_bytes: int
    """That they take in the network's own precision."""
    num_bytes: int
    """That they take in fewer bits, scales included."""

    @classmethod
    def of(cls, network: nn.Module, kind: Kind) -> Quantized:
        """Of a network whose weights are whole, which may lie on the meta device."""
        weights = [layer.weight for layer in _linear_layers(network)]
        return cls(
            kind,
            sum(weight.numel() for weight in weights),
            sum(weight.nbytes for weight in weights),
            sum(_bytes_of(weight.shape, kind) for weight in weights),
        )

    def __str__(self) -> str:
        """For people: kind, weights, and the memory that they take now and took before."""
        unit, size = ("GiB", 1 << 30) if self.whole_bytes >= 1 << 30 else ("MiB", 1 << 20)
        return (
            f"{self.kind}: {self.weights / 1e6:,.0f} M weights of linear layers, "
            f"{self.num_bytes / size:.2f} {unit} in place of {self.whole_bytes / size:.2f}"
        )


def describe_quantized(found: Quantized | None) -> list[tuple[str, str]]:
    """A row for the head of a run and of its plan; none of a base whose weights are whole."""
    return [] if found is None else [("base", f"{found}; policy and reference share it")]


def quantize(network: nn.Module, kind: Kind, device: torch.device) -> Quantized:
    """Give a frozen network's linear layers weights of fewer bits, each on ``device`` as it is
    made; what else it holds stays where it is. Names of other parameters and layers stay.
    """
    told = Quantized.of(network, kind)
    for layer in _linear_layers(network):
        _quantize(layer, kind, device)
    return told


class QuantizedLinear(nn.Linear):
    """A linear layer without gradients of its own; what it keeps of its weight is integers.

    As buffers that no state dict names: of floats the networks' casts would make others, parameters
    ZeRO would broadcast or divide, and checkpoints would hold what does not train.
    """

    kind: Kind
    dtype: torch.dtype
    packed: Tensor
    """(out, in) int8, of `fp8` its bits; of `nf4` two weights a byte, uint8 (blocks * 32, 1)."""
    scales: Tensor
    """The bits of float32: (out, 1) int32; of `nf4` (blocks,)."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out, in), whole: made anew for whoever reads it, and no use to write to."""
        scales = self.scales.view(torch.float32)
        if self.kind == "nf4":
            # Block by block: on a CPU bitsandbytes 0.50 mistakes the scales of rows that do not end
            # where a block does.
            blocks: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
                self.packed, scales, BLOCK, "nf4", [len(scales), BLOCK], self.dtype
            )
            count = self.out_features * self.in_features
            return blocks.flatten()[:count].view(self.out_features, self.in_features)
        held = torch.int8 if self.kind == "int8" else torch.float8_e4m3fn
        return (self.packed.view(held).float() * scales).to(self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self)
        return product


class _Product(torch.autograd.Function):
    """x W^T + b, of which the backward pass makes W anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight, None


def _linear_layers(network: nn.Module) -> list[nn.Linear]:
    return [layer for layer in network.modules() if type(layer) is nn.Linear]


def _quantize(layer: Any, kind: Kind, device: torch.device) -> None:
    whole = layer.weight.detach().to(device)
    if kind == "nf4":
        import bitsandbytes  # noqa: F401  registers its operators

        flat = functional.pad(whole.flatten(), (0, -whole.numel() % BLOCK))
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(flat, BLOCK, "nf4", torch.uint8)
    else:
        packed, scales = _by_rows(whole, kind)
    del layer._parameters["weight"]
    layer.__class__ = QuantizedLinear
    layer.kind, layer.dtype = kind, whole.dtype
    layer.register_buffer("packed", packed, persistent=False)
    layer.register_buffer("scales", scales.contiguous().view(torch.int32), persistent=False)


def _by_rows(whole: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    config = Int8WeightOnlyConfig if kind == "int8" else Float8WeightOnlyConfig
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(whole, requires_grad=False)
    quantize_(layer, config())
    made: Any = layer.weight
    return made.qdata.view(torch.int8), made.scale


def _bytes_of(shape: torch.Size, kind: Kind) -> int:
    rows, columns = shape
    if kind == "nf4":
        return -(-rows * columns // BLOCK) * (BLOCK // 2 + FLOAT32)
    return rows * (columns + FLOAT32)
