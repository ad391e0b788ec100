"""What a call costs beside time: launches and memory on a GPU, operators on a CPU."""

import torch
from measuring.timing import Prepare
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def count_launches(prepare: Prepare) -> int:
    """Kernels, copies and fills that run on the GPU, as the profiler saw them."""
    run = prepare()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(
        event.device_type == DeviceType.CUDA and not event.is_user_annotation
        for event in profiler.events()
    )


class _Counter(TorchDispatchMode):
    """Operators that compute; views and bare allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A view that hides that it is one, as matrix products of three dimensions return it.
        is_view = func.is_view or func is torch.ops.aten._unsafe_view.default
        allocates = func.namespace == "aten" and "empty" in func.name()
        self.count += not (is_view or allocates)
        return func(*args, **(kwargs or {}))


def count_operators(prepare: Prepare) -> int:
    """Operators of eager PyTorch: each is one launch or more on a GPU."""
    run = prepare()
    with _Counter() as counter:
        run()
    return counter.count


def peak_bytes(prepare: Prepare) -> int:
    """GPU memory at the call's peak, above what was allocated before it."""
    run = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
