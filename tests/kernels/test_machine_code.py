"""What the machine code of the layers' kernels may cost: held without a GPU, on sm_90.

The real launchers run on meta tensors; what they would compile is compiled and disassembled.
"""

import importlib
from functools import cache
from pathlib import Path

import pytest
import torch
from cdpo.kernels.dispatch import HAS_TRITON, INTERPRETED

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="compiles kernels, of which this process has none"),
]
group_norm = importlib.import_module("cdpo.kernels.group_norm_silu.op")
geglu = importlib.import_module("cdpo.kernels.geglu")

# Thread-instructions an element; inductor's statistics take 28 to 31, its apply 36 to 49, GEGLU 40.
BUDGET = {
    "forward_statistics_kernel": 12,
    "forward_apply_kernel": 20,
    "backward_sums_kernel": 24,
    "backward_apply_kernel": 24,
    "_forward_kernel": 34,
    "_backward_kernel": 40,
}
COMBINE_TRIPS = 8
# The recipes' micro-batches, and one image for the VAE.
IMAGES = {"SD1.5@512": 8, "SDXL@1024": 2}
VAE = [(128, 1024), (128, 512), (256, 512), (256, 256), (512, 256), (512, 128), (256, 1024)]
SD, LOW = (8, 320, 64, 64), (8, 1280, 8, 8)
# Chunks of both are as long as the budget of instructions wants; they hold 2.5 MB.
FEW_PROGRAMS = {(2, 640, 32, 32), (8, 640, 16, 16)}
# The compiler holds two tiles of three tensors at once.
REGISTERS = {("backward_apply_kernel", LOW): 144}


@pytest.fixture(scope="session")
def machine_code():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        module = importlib.import_module("kernel_bench.machine_code")
        patch.setattr(module, "compiled", cache_by_code(module.compiled))
        yield module


def cache_by_code(compiled):
    kept = {}

    def once(launch, sm=90):
        key = (launch.specialisation, sm)
        if key not in kept:
            kept[key] = compiled(launch, sm)
        return kept[key]

    return once


def meta(*shape, dtype=torch.bfloat16):
    x = torch.empty(*shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def norm(shape, silu=True):
    """Both ways, of a layer with frozen weights."""
    x, weight = meta(*shape), meta(shape[1])
    _, mean, rstd = group_norm._forward_triton(x, weight, weight, 32, 1e-5, silu)
    group_norm._backward_triton(x, x, weight, weight, mean, rstd, silu, False)


def gate(tokens, width):
    projected = meta(tokens, 2 * width)
    geglu._forward_triton(projected)
    geglu._backward_triton(meta(tokens, width), projected)


CALLS = {shape: lambda shape=shape: norm(shape) for shape in (SD, LOW)}
CALLS["geglu"] = lambda: gate(8 * 4096, 1280)


def constants(launch):
    return {launch.kernel.arg_names[index[0]]: x for index, x in launch.constants.items()}


def cost(launch, code, shape):
    """Thread-instructions an element."""
    known = constants(launch)
    if "BLOCK" in known:
        return code.thread_instructions() / (known["BLOCK"] / launch.threads)
    tiles = trips = 1
    if launch.name in ("forward_statistics_kernel", "backward_sums_kernel"):
        cut = group_norm._cut_of(meta(*shape), 32)
        tiles = trips = cut.sums_sizes[1] // known["TILE_ROWS"]
        trips -= launch.name == "forward_statistics_kernel"  # the first is origin
    elements = tiles * known["TILE_ROWS"] * known["BLOCK_C"] / launch.threads
    return code.thread_instructions(trips) / elements


@cache
def layers(machine_code):
    return {name: machine_code.launches(call) for name, call in CALLS.items()}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("layer", CALLS, ids=str)
def test_budget_registers_and_accesses(machine_code, layer):
    for launch in layers(machine_code)[layer]:
        code = machine_code.compiled(launch)
        assert cost(launch, code, layer) <= BUDGET[launch.name], launch.name
        assert code.registers <= REGISTERS.get((launch.name, layer), 128), launch.name
        used = machine_code.opcodes(code.instructions)
        assert not [name for name in used if name.startswith(("LDL", "STL"))]  # no local memory
        body = code.instructions[code.loops[0]] if code.loops else code.main_path
        moved = [x for x in machine_code.opcodes(body) if x.startswith(("LDG", "STG"))]
        wide = [x for x in moved if x.endswith(".128")]
        # Beside the tensors themselves only what is the same for a channel
        assert wide
        assert all(x in ("LDG.E.128", "STG.E.128", "LDG.E", "LDG.E.U16") for x in moved)
        assert not code.loops or moved == wide


def test_a_ticket_is_between_fences(machine_code):
    tickets = 0
    for launch in layers(machine_code)[SD]:
        code = machine_code.compiled(launch)
        names = machine_code.opcodes(code.instructions)
        for i, name in enumerate(names):
            if name.startswith("ATOMG"):
                tickets += 1
                assert any(x.startswith("MEMBAR") and x.endswith("GPU") for x in names[i - 4 : i])
                # What all threads have stored is behind a barrier of the program
                stored = max(j for j in range(i) if names[j].startswith("STG"))
                assert any(x.startswith("BAR.SYNC") for x in names[stored:i])
                assert names[i + 1].startswith("CCTL.IVALL")
    assert tickets == 2


def shapes(machine_code):
    """Of every GroupNorm of the networks, with its images."""
    calls = importlib.import_module("kernel_bench.unet_layers")
    for model, images in IMAGES.items():
        for call in calls.layer_calls(model):
            if isinstance(call, calls.GroupNormCall):
                yield images, call.channels, call.height, call.width
    yield from ((1, channels, size, size) for channels, size in VAE)


@pytest.mark.timeout(600)
def test_every_layer_keeps_the_gpu_busy_and_combines_few_sums(machine_code):
    seen = 0
    for shape in set(shapes(machine_code)):
        cut = group_norm._cut_of(meta(*shape), 32)
        assert cut.sums_grid[0] >= group_norm.PROGRAMS or shape in FEW_PROGRAMS, shape
        assert cut.apply_grid[0] >= group_norm.PROGRAMS, shape
        values = cut.partials[1] * shape[1] // 32  # of a group
        assert values <= COMBINE_TRIPS * cut.sums["FLAT_TILE"], shape
        seen += 1
    assert seen > 20
