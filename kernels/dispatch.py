"""Which implementation runs: Triton kernel, Triton interpreter or PyTorch reference.

`auto` (the default) takes Triton for CUDA tensors and PyTorch for CPU tensors. If the process was
started with TRITON_INTERPRET=1, CPU tensors go through the Triton interpreter: exact, slow, made
for tests. float64 always takes PyTorch in `auto`, for the kernels compute in float32. Triton is
optional; without it `auto` means PyTorch everywhere, and says so once if there is a GPU.
"""

import math
import struct
import warnings
from contextlib import nullcontext
from types import SimpleNamespace, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

triton: Any
tl: Any
try:
    import triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]

    HAS_TRITON = True
    INTERPRETED = bool(triton.knobs.runtime.interpret)  # fixed when the kernels are decorated
except ImportError:
    triton, tl = SimpleNamespace(jit=lambda fn: fn), SimpleNamespace(constexpr=int)
    HAS_TRITON = INTERPRETED = False

MODES = ("auto", "triton", "torch")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = torch.finfo(torch.float32).max
SMALLEST = 1e-18  # its square is a float32 number as well
# Launch option: no contraction of a·b + c to one rounding. The kernels wait for memory anyway, and
# results then follow the source, not the compiler: alike in kernels that share a formula, in the
# interpreter, and across Triton versions, whose default changes with 3.10.
NO_FUSION = {"enable_fp_fusion": False}
_mode = "auto"
_warned = False


class CompileSpec(NamedTuple):
    """One specialisation of a kernel, as `benchmarks/compile_report.py` compiles it."""

    name: str
    kernel: Any
    signature: dict[str, str]  # argument -> Triton type; may name more than this kernel has
    constants: dict[str, Any]  # constexpr argument -> value; the same
    num_warps: int


class use:
    """Force an implementation: `use("torch")` from now on, `with use("torch"):` for a block.

    The setting holds for the whole process, because autograd runs CUDA backwards in threads of
    its own.
    """

    def __init__(self, mode: str) -> None:
        global _mode
        if mode not in MODES:
            raise ValueError(f"kernels: {mode!r} is not one of {', '.join(MODES)}")
        if mode == "triton" and not HAS_TRITON:
            raise RuntimeError("kernels: triton was asked for but is not installed; use auto")
        self._previous, _mode = _mode, mode

    def __enter__(self) -> "use":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _mode
        _mode = self._previous


def takes_triton(*tensors: Tensor) -> bool:
    """True if these tensors go to Triton, False if they go to PyTorch; an error if forced wrong."""
    global _warned
    on_gpu = tensors[0].is_cuda
    half_or_single = all(t.dtype in FLOATS or not t.is_floating_point() for t in tensors)
    if _mode == "torch":
        return False
    if _mode == "triton":
        if not (on_gpu or INTERPRETED):
            raise RuntimeError(
                f"kernels: triton was forced, but the tensors are on {tensors[0].device}: move "
                "them to CUDA, start with TRITON_INTERPRET=1, or use auto"
            )
        if not half_or_single:
            raise TypeError("kernels: triton was forced, but float64 is taken by torch only")
        return True
    if on_gpu and not HAS_TRITON and not _warned:
        _warned = True
        warnings.warn("triton is not installed: kernels take slow PyTorch paths", stacklevel=3)
    return HAS_TRITON and half_or_single and (on_gpu or INTERPRETED)


def check_floating(**tensors: Tensor) -> None:
    """Refuse integer, complex and eight-bit tensors."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (*FLOATS, torch.float64):
            raise TypeError(
                f"{name} is {tensor.dtype}; taken are bfloat16, float16, float32 (and float64)"
            )


def check_same_device(**tensors: Tensor) -> None:
    """Refuse tensors spread over devices."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    if len(set(devices.values())) > 1:
        given = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device; given {given}")


def check_choice(name: str, value: str, taken: tuple[str, ...]) -> None:
    """Refuse a word that is not among those taken."""
    if value not in taken:
        raise ValueError(f"{name} is {value!r}; taken are {', '.join(taken)}")


def check_pairs(given: str, tensor: Tensor) -> None:
    """Refuse what is not `[winners; losers]`; `given` begins the message: "latents are"."""
    if tensor.ndim < 2 or tensor.numel() == 0 or tensor.shape[0] % 2:
        raise ValueError(
            f"{given} {tuple(tensor.shape)}; taken is (2B, ...): at least one pair, as many losers "
            "as winners, no empty sample"
        )


def check_per_pair(pairs: int, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Refuse what is not one number a pair, of this dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype}; it must be {dtype}")
        if tensor.shape != (pairs,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; it must be ({pairs},)")


def check_positive(**scalars: float) -> None:
    """Refuse zero, negative, infinite and NaN scalars, and those that float32 makes such."""
    for name, value in scalars.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be positive and finite")
        if not SMALLEST <= value <= LARGEST:
            raise ValueError(f"{name} is {value}; kernels take {SMALLEST:g} to {LARGEST:g}")


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Of the arithmetic: float32, as in the kernels, or float64 if a tensor is."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def as_float32(value: float) -> float:
    """The scalar as a kernel sees it, so that every implementation computes with the same one."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the device of the first argument, a tensor.

    Triton finds out at each launch what it has compiled, by strings of all arguments and options:
    half of a fused layer's cost on the host. What it specialises a kernel for is known without
    them: dtypes, whether addresses divide by 16, and values that are no floats; where these were
    met before, what it compiled then is launched at once, with the hooks of profilers.
    """
    first = arguments[0]
    device = first.get_device()
    met = [
        (value.dtype, value.data_ptr() % 16)
        if isinstance(value, Tensor)
        else float
        if type(value) is float
        else value
        for value in arguments
    ]
    # What profilers (Proton's instrumentation) and debuggers may change while a process runs.
    compilation, runtime = triton.knobs.compilation, triton.knobs.runtime
    met += [compilation.instrumentation_mode, runtime.debug]
    key = (kernel.fn, device, *met, *constants, *constants.values())
    # Hooks of Triton's own launcher want to see each launch, or compile in a way of their own.
    hooked = kernel.pre_run_hooks or runtime.add_stages_inspection_hook
    found = None if hooked else _compiled.get(key)
    elsewhere = first.is_cuda and device != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        if found is None:
            compiled = kernel[grid](*arguments, **constants)
        else:
            compiled, last = found
            compiled[(*grid, 1, 1)](*arguments, *last)  # which takes three sizes of a grid
    if compiled is not None and not (found or hooked):  # the interpreter compiles nothing
        names = kernel.arg_names[len(arguments) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)


def is_traced(tensor: Tensor) -> bool:
    """Whether something looks at operations, and does not only run them: torch.compile, a counter.

    Then a kernel has to be one operation of `torch.library`; otherwise the launcher may be called
    at once, which costs the host a third.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or is_in_torch_dispatch_mode()
    )


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is done with these tensors.

    What it does not record, the reference's pass and all sampling, is spared its bookkeeping, a
    quarter of a fused layer's cost on the host.
    """
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


_tickets: dict[tuple[int, int], Tensor] = {}


def zero_tickets(count: int, device: torch.device) -> Tensor:
    """int32 zeros that a kernel leaves zero, kept for each stream: kernels of one never overlap.

    A CUDA graph gets its own, for it may be replayed on any stream; and what was allocated from a
    graph's memory pool is not kept, for PyTorch takes the whole pool back (the warm-up runs of
    `torch.compile(mode="reduce-overhead")` allocate there without capturing yet).
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        key = (torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
        kept = _tickets.get(key)
        capturing = torch.cuda.is_current_stream_capturing()
        if kept is not None and len(kept) >= count and not capturing:
            return kept
        tickets = torch.zeros(max(count, 1024), dtype=torch.int32, device=device)
        if not capturing and in_default_pool(tickets):
            _tickets[key] = tickets
        return tickets


def in_default_pool(tensor: Tensor) -> bool:
    """Whether the tensor's memory is known to lie outside of private pools.

    CUDA's own allocator (`PYTORCH_CUDA_ALLOC_CONF=backend:cudaMallocAsync`) tells nothing of its
    memory: there no ticket is kept.
    """
    if torch.cuda.get_allocator_backend() != "native":
        return False
    address = tensor.data_ptr()
    return any(
        segment["address"] <= address < segment["address"] + segment["total_size"]
        and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)
        for segment in torch.cuda.memory_snapshot()
    )
