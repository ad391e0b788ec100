"""What inductor's own fused kernels issue an element, told without a GPU: the bar for a new kernel.

    python benchmarks/bench_inductor.py

A layer is lowered for an H200 that is not there, each Triton kernel that inductor writes for it is
compiled in the block sizes that inductor tries, and the machine code of the best is counted. Beside
it stands what a kernel may issue while the memory is still its limit: a handwritten kernel that
moves the same bytes gains nothing where inductor is below that.
"""

import importlib.util
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch._dynamo.device_interface as interface
from kernel_bench.machine_code import Launch, MachineCode, compiled, opcodes, stand_in_driver
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

BYTES_A_SECOND = 0.92 * 4.3e12  # of an H200, copying
THREAD_INSTRUCTIONS_A_SECOND = 0.7 * 32 * 4 * 132 * 1.98e9
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=150 << 30,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    L2_cache_size=50 << 20,
    warp_size=32,
    gcnArchName="",
)
HALF, FULL = torch.bfloat16, torch.float32
IMPORTS = """import triton, triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


class Layer(NamedTuple):
    """A layer on inputs of these shapes, and what must be read and written of an element."""

    name: str
    compute: Callable[..., Any]
    inputs: list[tuple[tuple[int, ...], torch.dtype]]
    bytes_an_element: int

    @property
    def elements(self) -> int:
        return torch.Size(self.inputs[0][0]).numel()

    @property
    def budget(self) -> float:
        """Thread-instructions an element that a device issues while it moves its bytes."""
        return self.bytes_an_element / BYTES_A_SECOND * THREAD_INSTRUCTIONS_A_SECOND


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def gated(x: Tensor, gate: Tensor, update: Tensor) -> Tensor:
    return x + gate[:, None] * update


def gated_and_modulated(x: Tensor, gate: Tensor, update: Tensor, *to: Tensor) -> tuple[Tensor, ...]:
    summed = gated(x, gate, update)
    return summed, modulate(summed, *to)


def modulate_backward(
    x: Tensor, scale: Tensor, grad: Tensor, mean: Tensor, inverse: Tensor
) -> Tensor:
    """With adapters nothing asks for the gradients of scale and shift."""
    normal = (x.float() - mean) * inverse
    grad = (grad * (1 + scale[:, None])).float()
    along = (grad * normal).mean(-1, keepdim=True)
    return (inverse * (grad - grad.mean(-1, keepdim=True) - normal * along)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return (x.float() * inverse).to(x.dtype) * weight


def rotated(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    normal = rms_norm(x, weight)
    even, odd = normal.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(3)
    return (normal.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


def rotated_backward(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, grad: Tensor, inverse: Tensor
) -> Tensor:
    even, odd = (grad.float() * sin[:, None]).unflatten(-1, (-1, 2)).unbind(-1)
    back = grad.float() * cos[:, None] + torch.stack([odd, -even], -1).flatten(3)
    grad, normal = (back.to(x.dtype) * weight).float(), x.float() * inverse
    return (inverse * (grad - normal * (grad * normal).mean(-1, keepdim=True))).to(x.dtype)


def layers() -> Iterator[Layer]:
    """Of Stable Diffusion 3.5 medium and FLUX.1, at 1024 pixels, 2 pairs."""
    for name, width, head in (("SD3.5", 1536, 64), ("FLUX.1", 3072, 128)):
        tokens, row = (4, 4096, width), (4, width)
        x, per_sample, per_token = (tokens, HALF), (row, HALF), ((4, 4096, 1), FULL)
        yield Layer(f"{name}: LayerNorm, modulated", modulate, [x, per_sample, per_sample], 4)
        yield Layer(
            f"{name}: its backward",
            modulate_backward,
            [x, per_sample, x, per_token, per_token],
            6,
        )
        yield Layer(f"{name}: gated residual", gated, [x, per_sample, x], 6)
        yield Layer(
            f"{name}: gated residual, LayerNorm, modulated",
            gated_and_modulated,
            [x, per_sample, x, per_sample, per_sample],
            8,
        )
        heads, weight = ((4, 4608, width // head, head), HALF), ((head,), HALF)
        if name == "SD3.5":
            yield Layer(f"{name}: RMSNorm of q", rms_norm, [heads, weight], 4)
            continue
        turns, inverse = ((4608, head), FULL), ((4, 4608, width // head, 1), FULL)
        yield Layer(f"{name}: RMSNorm and RoPE of q", rotated, [heads, weight, turns, turns], 4)
        yield Layer(
            f"{name}: its backward",
            rotated_backward,
            [heads, weight, turns, turns, heads, inverse],
            6,
        )


@contextmanager
def imagined_gpu() -> Iterator[None]:
    """Inductor and Triton believe that an H200 is there; nothing may be run."""
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": H200,
        "get_device_capability": (9, 0),
        "get_compute_capability": "90",
        "_lazy_init": None,
    }
    with stand_in_driver(), ExitStack() as stack:
        for place in (torch.cuda, interface.CudaInterface, interface.CudaInterface.Worker):
            for name, answer in answers.items():
                if hasattr(place, name):
                    stack.enter_context(patch.object(place, name, lambda *_, a=answer, **__: a))
        yield


def written(layer: Layer) -> str:
    """The program that inductor writes for a layer."""
    traced = make_fx(layer.compute, select_decomp_table(), tracing_mode="fake")(
        *(torch.empty(shape, dtype=dtype) for shape, dtype in layer.inputs)
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        inputs = [torch.empty(shape, dtype=dtype, device="cuda:0") for shape, dtype in layer.inputs]
    FakeTensorProp(traced, mode=mode).propagate_dont_convert_inputs(*inputs)
    with V.set_fake_mode(mode):
        post_grad_passes(traced, is_inference=True)
        graph = GraphLowering(traced, example_inputs=inputs, is_inference=True)
        with V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
            graph.run(*inputs)
            return str(graph.codegen()[0].value)


def launches(program: str, folder: Path) -> Iterator[list[tuple[Launch, int]]]:
    """Of each kernel of a program: launches in all block sizes, and the trips of their loops."""
    for number, found in enumerate(
        re.finditer(r"async_compile\.triton\('(\w+)', '''(.*?)'''", program, re.S)
    ):
        name, text = found.groups()
        file = folder / f"kernel_{number}.py"
        file.write_text(IMPORTS + text[text.index("@triton.jit") :])
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        told = re.search(r"triton_meta=(\{.*?\}),\n", text, re.S)
        kind = re.search(r"@triton_heuristics\.(\w+)\(", text)
        assert told is not None and kind is not None
        meta = eval(told[1], {"DeviceProperties": dict, "torch": torch})  # noqa: S307 inductor wrote it
        sizes = {axis: int(size) for axis, size in re.findall(r"\b(\w+)numel = (\d+)", text)}
        yield [
            (_launch(getattr(module, name), meta, sizes, blocks, warps), trips)
            for blocks, warps, trips in tried(kind[1], sizes)
        ]


def tried(kind: str, sizes: dict[str, int]) -> Iterator[tuple[dict[str, int], int, int]]:
    """Block sizes, warps, and trips of a loop over what is reduced."""
    if kind == "pointwise":
        for block, warps in ((256, 4), (512, 4), (512, 8), (1024, 4), (1024, 8)):
            yield {"XBLOCK": block}, warps, 1
    elif kind == "persistent_reduction":
        for block in (1, 8):
            for warps in (2, 4, 8):
                yield {"XBLOCK": block}, warps, 1
    elif kind == "reduction":
        for block in (1, 2, 4, 8):
            for reduced in (512, 1024, 2048, 4096):
                if block * reduced <= 4096:
                    trips = ceil(sizes["r0_"] / reduced)
                    yield {"XBLOCK": block, "R0_BLOCK": reduced}, 4 if reduced < 2048 else 8, trips
    else:
        raise ValueError(f"no block sizes are known of a {kind} of inductor's")


def _launch(
    kernel: Any, meta: dict[str, Any], sizes: dict[str, int], blocks: dict[str, int], warps: int
) -> Launch:
    constants = {**meta["constants"], **blocks}
    names = kernel.arg_names
    return Launch(
        kernel,
        {name: "constexpr" if name in blocks else meta["signature"][name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {place: how for config in meta["configs"] for place, how in config.items()},
        {"num_warps": warps, "num_stages": 1},
        (ceil(sizes["x"] / blocks["XBLOCK"]),),
    )


def issued(launch: Launch, code: MachineCode, trips: int) -> int:
    """Thread-instructions of a launch; a loop unrolled in part counts as if it were not."""
    again = sum(len(code.instructions[loop]) for loop in code.loops)
    return (len(code.main_path) + (trips - 1) * again) * launch.threads * launch.programs


def main() -> None:
    table = Table(title="Thread-instructions an element, sm_90, computed")
    for column in ("layer", "kernels", "inductor", "memory is the limit up to"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    with imagined_gpu(), tempfile.TemporaryDirectory() as folder:
        for layer in layers():
            best = []
            for kernel in launches(written(layer), Path(folder)):
                codes = [(launch, compiled(launch), trips) for launch, trips in kernel]
                kept = [one for one in codes if not spills(one[1])]
                best.append(min(issued(*one) for one in kept))
            each = sum(best) / layer.elements
            table.add_row(layer.name, str(len(best)), f"{each:.1f}", f"{layer.budget:.1f}")
    Console().print(table)


def spills(code: MachineCode) -> bool:
    return any(name.startswith(("LDL", "STL")) for name in opcodes(code.instructions))


if __name__ == "__main__":
    main()
