"""A CUDA graph's stand-in on a CPU: the operations of a piece of work, noted down and done again.

What is replayed are the operations alone, on the very tensors of the recording, so whatever Python
has decided or read meanwhile stays as it was then. While it records it holds the work to the rules
of a capture: nothing looks at a value, nothing reads what the host has made since the warm-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")
# What looks at values to know the size of its result, or is asked for a value.
LOOKS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "unique")
LOOKS += ("repeat_interleave.Tensor",)


def tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, list | tuple):
        return []
    return [tensor for value in values for tensor in tensors_in(value)]


def place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Noted(TorchDispatchMode):
    """Notes operations, and what they read that none of them has made."""

    def __init__(self, known: dict[int, Tensor] | None) -> None:
        """``known`` is what may be read, by its place; None while that is found out."""
        super().__init__()
        self.known = known
        self.done: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, Tensor] = {}
        self.read: dict[int, Tensor] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op.name().removeprefix("aten::")
        given = tensors_in((args, kwargs))
        masks = [t for t in tensors_in(args[1:2]) if t.dtype in (torch.bool, torch.uint8)]
        looks = name.startswith(LOOKS) or (name.startswith("index") and bool(masks))
        assert not looks, f"{name} waits for the device"
        for tensor in given:
            if tensor.numel() and (at := place(tensor)) not in self.made:
                new = self.known is not None and at not in self.known
                assert not new, f"{name} reads what the host has made: {tensor.shape}"
                self.read[at] = tensor
        result = op(*args, **kwargs)
        self.made |= {place(t): t for t in tensors_in(result) if place(t) not in self.read}
        self.done.append((op, args, kwargs, result))
        return result


class Tape:
    """Records as `CudaRecorder` does."""

    def __init__(self) -> None:
        self._known: dict[int, Tensor] = {}

    def warm_up(self, work: Callable[[], object]) -> None:
        with Noted(None) as noted:
            work()
        # All of it is kept, so that no other tensor comes to lie there.
        self._known |= noted.read | noted.made

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        with Noted(self._known) as noted:
            result = work()
        self._known |= noted.made

        @torch.no_grad()
        def replay() -> None:
            for op, args, kwargs, results in noted.done:
                again = op(*args, **kwargs)
                for ours, new in zip(tensors_in(results), tensors_in(again), strict=True):
                    if place(ours) != place(new):  # a view, or done in place
                        ours.copy_(new)

        return result, replay
