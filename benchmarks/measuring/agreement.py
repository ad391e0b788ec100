"""Do two implementations compute the same? A benchmark of different computations is worthless.

The truth is the eager code in float64. An implementation may be off by twice what eager PyTorch
loses at the dtype of its inputs, as in the kernel tests, plus one rounding of the result, or SLACK
if that is more: the mean over few pairs may by luck come out exact in eager code.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Function = Callable[..., Tensor | Sequence[Tensor]]  # called with inputs as keyword arguments
SLACK = 1e-4  # of the largest value; another formula is off by more
MAX_INPUT_BYTES = 1 << 28  # float64 copies of larger inputs may not fit beside them


class Disagreement(AssertionError):
    """Two implementations that are to be compared compute different things."""


def leaves(inputs: Inputs) -> list[Tensor]:
    """The inputs that a gradient is wanted for."""
    return [tensor for tensor in inputs.values() if tensor.requires_grad]


def compare(ours: Function, eager: Function, inputs: Inputs) -> dict[str, float] | None:
    """Largest errors of outputs and gradients, relative to the largest true value.

    Raises Disagreement where ours are too large; None if the inputs are too large to compare.
    """
    if sum(tensor.nbytes for tensor in inputs.values()) > MAX_INPUT_BYTES:
        return None
    truth = list(_results(eager, {name: _double(x) for name, x in inputs.items()}))
    errors = {"ours": 0.0, "eager": 0.0}
    found = zip(_results(ours, inputs), _results(eager, inputs), truth, strict=True)
    for index, (mine, theirs, true) in enumerate(found):
        largest = true.abs().max().item()
        error, eager_error = ((x - true).abs().max().item() / largest for x in (mine, theirs))
        allowed = 2 * eager_error + max(torch.finfo(mine.dtype).eps, SLACK)
        if not error <= allowed:
            raise Disagreement(
                f"result {index} is off by {error:.2e} of its largest value, where eager PyTorch "
                f"is off by {eager_error:.2e}: these are different computations"
            )
        errors["ours"] = max(errors["ours"], error)
        errors["eager"] = max(errors["eager"], eager_error)
    return errors


def compare_distributions(ours: Function, eager: Function, inputs: Inputs) -> None:
    """Both give as many standard normals; the moments must be within six standard errors."""
    for function in (ours, eager):
        normals = function(**inputs)
        count = normals.numel()
        for power, expected, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            moment = normals.double().pow(power).mean().item()
            if not abs(moment - expected) <= 6 * math.sqrt(variance / count):
                raise Disagreement(f"moment {power} of {count} normals is {moment:.4f}")


def _results(function: Function, inputs: Inputs) -> Iterator[Tensor]:
    """Outputs, and gradients under random weights of the outputs' elements."""
    outputs = as_list(function(**inputs))
    yield from (output.detach() for output in outputs)
    if leaves(inputs):
        differentiable = [output for output in outputs if output.requires_grad]
        weights = [weights_like(output) for output in differentiable]
        yield from torch.autograd.grad(differentiable, leaves(inputs), weights)


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def weights_like(output: Tensor) -> Tensor:
    """Upstream gradient: random, the same in every dtype; 1 for a loss."""
    if output.ndim == 0:
        return torch.ones_like(output)
    generator = torch.Generator(output.device).manual_seed(output.numel())
    shape, bfloat16 = output.shape, torch.bfloat16
    weights = torch.randn(shape, generator=generator, device=output.device, dtype=bfloat16)
    return torch.empty_like(output).copy_(weights)


def _double(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)
