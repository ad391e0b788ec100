"""What the machine code of the layers' kernels may cost: held without a GPU, on sm_90.

The real launchers run on meta tensors; what they would compile is compiled and disassembled.
"""

import importlib
from functools import cache

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
KERNELS = [(x, name) for x in CALLS for name in BUDGET if (x == "geglu") == name.startswith("_")]
TICKETS = ("forward_statistics_kernel", "backward_sums_kernel")


def mostly_long(cases):
    """A compilation takes one to three seconds: one layer stands for both."""
    return [pytest.param(*x, marks=pytest.mark.long) if x[0] == LOW else x for x in cases]


def constants(launch):
    return {launch.kernel.arg_names[index[0]]: x for index, x in launch.constants.items()}


def cost(launch, code, shape):
    """Thread-instructions an element."""
    known = constants(launch)
    if "BLOCK" in known:
        return code.thread_instructions() / (known["BLOCK"] / launch.threads)
    tiles = trips = 1
    if launch.name in TICKETS:
        cut = group_norm._cut_of(meta(*shape), 32)
        tiles = trips = cut.sums_sizes[1] // known["TILE_ROWS"]
        trips -= launch.name == "forward_statistics_kernel"  # the first is origin
    elements = tiles * known["TILE_ROWS"] * known["BLOCK_C"] / launch.threads
    return code.thread_instructions(trips) / elements


@cache
def launches(machine_code, layer):
    return {launch.name: launch for launch in machine_code.launches(CALLS[layer])}


@cache
def compiled(machine_code, layer, kernel):
    return machine_code.compiled(launches(machine_code, layer)[kernel])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layer", "kernel"), mostly_long(KERNELS), ids=str)
def test_budget_registers_and_accesses(machine_code, layer, kernel):
    code = compiled(machine_code, layer, kernel)
    assert cost(launches(machine_code, layer)[kernel], code, layer) <= BUDGET[kernel]
    assert code.registers <= REGISTERS.get((kernel, layer), 128)
    used = machine_code.opcodes(code.instructions)
    assert not [name for name in used if name.startswith(("LDL", "STL"))]  # no local memory
    body = code.instructions[code.loops[0]] if code.loops else code.main_path
    moved = [x for x in machine_code.opcodes(body) if x.startswith(("LDG", "STG"))]
    wide = [x for x in moved if x.endswith(".128")]
    # Beside the tensors themselves only what is the same for a channel
    assert wide
    assert all(x in ("LDG.E.128", "STG.E.128", "LDG.E", "LDG.E.U16") for x in moved)
    assert not code.loops or moved == wide


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kernel", TICKETS)
def test_a_ticket_is_between_fences(machine_code, kernel):
    names = machine_code.opcodes(compiled(machine_code, SD, kernel).instructions)
    (ticket,) = (i for i, name in enumerate(names) if name.startswith("ATOMG"))
    before = names[ticket - 4 : ticket]
    assert any(x.startswith("MEMBAR") and x.endswith("GPU") for x in before)
    # What all threads have stored is behind a barrier of the program
    stored = max(i for i in range(ticket) if names[i].startswith("STG"))
    assert any(x.startswith("BAR.SYNC") for x in names[stored:ticket])
    assert names[ticket + 1].startswith("CCTL.IVALL")


def shapes(model):
    """Of every GroupNorm of a network, with its images."""
    if model == "VAE":
        return {(1, channels, size, size) for channels, size in VAE}
    calls = importlib.import_module("kernel_bench.unet_layers")
    return {
        (IMAGES[model], call.channels, call.height, call.width)
        for call in calls.layer_calls(model)
        if isinstance(call, calls.GroupNormCall)
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "model", ["VAE", "SD1.5@512", pytest.param("SDXL@1024", marks=pytest.mark.long)]
)
def test_every_layer_keeps_the_gpu_busy_and_combines_few_sums(machine_code, model):
    found = shapes(model)
    assert len(found) >= len(VAE)
    for shape in found:
        cut = group_norm._cut_of(meta(*shape), 32)
        assert cut.sums_grid[0] >= group_norm.PROGRAMS or shape in FEW_PROGRAMS, shape
        assert cut.apply_grid[0] >= group_norm.PROGRAMS, shape
        values = cut.partials[1] * shape[1] // 32  # of a group
        assert values <= COMBINE_TRIPS * cut.sums["FLAT_TILE"], shape
