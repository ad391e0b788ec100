"""Memory layout of samples: kernels that treat a sample as a bag of elements need no NCHW order.

Two tensors may be walked together, element by element in memory order, if their samples (all
dimensions but the first) are dense and have the same strides: both NCHW, or both channels_last.
Then nothing is copied. Otherwise one of them has to be, and `match_samples` says which.
"""

import torch
from torch import Tensor


def sample_strides(tensor: Tensor) -> tuple[int, ...] | None:
    """Strides of one sample (0 where the size is 1), or None if the sample is not dense."""
    strides = tuple(
        stride if size > 1 else 0
        for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)
    )
    expected = 1
    for stride, size in sorted(zip(strides, tensor.shape[1:], strict=True)):
        if size > 1:
            if stride != expected:
                return None
            expected *= size
    return strides


def match_samples(leader: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors with samples in the leader's layout, copied only where they differ from it.

    The leader itself is made contiguous if its samples are not dense (a slice of channels, say).
    """
    if sample_strides(leader) is None:
        leader = leader.contiguous()
    layout = sample_strides(leader)
    matched = [
        other if sample_strides(other) == layout else empty_samples(other, leader).copy_(other)
        for other in others
    ]
    return leader, *matched


def empty_samples(like: Tensor, leader: Tensor) -> Tensor:
    """Uninitialised tensor of `like`'s shape and dtype, its samples laid out as the leader's."""
    strides = (leader[0].numel(), *leader.stride()[1:])
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)


def empty_whole_samples(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised tensor in `like`'s memory format if that is one dense sample after another."""
    out = torch.empty_like(like, dtype=dtype)
    if out.stride(0) == out[0].numel():
        return out
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)
