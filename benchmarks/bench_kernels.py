"""Times every kernel beside eager PyTorch and beside torch.compile of that eager code.

    python benchmarks/bench_kernels.py             on a GPU, at the shapes of SD1.5, LCM and SDXL
    python benchmarks/bench_kernels.py --tiny      small shapes: under a minute on a CPU

Alternatives take turns in one process. Before anything is timed it is checked that they compute the
same. Writes a JSON and, in a folder of its name, a plot a kernel. `kernel_bench/cases.py` is the
list of kernels, `kernel_bench/results.py` tells what the JSON holds.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from kernel_bench.case import Case
from kernel_bench.cases import cases
from kernel_bench.plots import draw_all
from kernel_bench.results import (
    NOTES,
    OURS,
    PHASES,
    Row,
    add_bandwidth,
    drop_absolutes,
    implementation_row,
    speedups,
    summarise,
    table,
)
from kernel_bench.unet_layers import NETWORKS
from measuring.agreement import Function, Inputs, as_list, leaves, weights_like
from measuring.device_costs import count_launches, count_operators, peak_bytes
from measuring.provenance import ROOT, provenance, slug
from measuring.timing import Clock, Prepare, clock_of, copy_bandwidth, empty_ms, take_turns
from rich.console import Console
from rich.progress import track
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

RESULTS = ROOT / "benchmarks" / "results"
TINY_MODEL, TINY_BATCHES = "tiny@64", [2, 8]
BUDGET_S, TINY_BUDGET_S = 0.3, 0.05  # for one phase of one case


def phase_of(phase: str, function: Function, inputs: Inputs) -> Prepare:
    """What `take_turns` is to time: the forward, the backward of an untimed forward, or both."""

    def forward():
        return function(**inputs)

    def differentiable(outputs):
        return [output for output in as_list(outputs) if output.requires_grad]

    def backward_of(outputs):
        return lambda: torch.autograd.grad(outputs, wanted, weights)

    if phase == "forward":
        return lambda: forward
    wanted = leaves(inputs)
    weights = [weights_like(output) for output in differentiable(forward())]
    if phase == "backward":
        return lambda: backward_of(differentiable(forward()))
    return lambda: lambda: backward_of(differentiable(forward()))()


def compile_eager(case: Case, inputs: Inputs, console: Console) -> dict[str, Function]:
    """The eager code under torch.compile; nothing, and a line that says so, if it cannot."""
    torch.compiler.reset()
    compiled = torch.compile(case.eager, dynamic=False)
    try:
        phase_of("both" if case.bytes_backward else "forward", compiled, inputs)()()
    except (TorchDynamoException, InductorError) as error:
        reason = str(error).strip().partition("\n")[0]
        console.print(f"not compiled: {case.kernel}, {case.shape}: {reason}", style="yellow")
        return {}
    return {"compiled": compiled}


def measure(
    case: Case, clock: Clock, budget_s: float, compiles: bool, console: Console
) -> Iterator[Row]:
    """Rows of one case, a phase each."""
    device = clock.device
    inputs = case.make_inputs(device)
    error = case.agreement(case.ours, case.eager, inputs)
    functions = {"ours": case.ours, "eager": case.eager}
    functions |= compile_eager(case, inputs, console) if compiles else {}
    functions |= case.others
    num_bytes = {"forward": case.bytes_forward, "backward": case.bytes_backward}
    num_bytes["both"] = sum(num_bytes.values())
    for phase in PHASES if case.bytes_backward else PHASES[:1]:
        tasks = {name: phase_of(phase, function, inputs) for name, function in functions.items()}
        times = take_turns(tasks, clock, budget_s)
        yield {
            "kernel": case.kernel,
            "model": case.model,
            "pairs": case.pairs,
            "shape": case.shape,
            "count": case.count,
            "phase": phase,
            "bytes": num_bytes[phase],
            "error": error,
            "implementations": {
                name: implementation_row(times[name], **costs(name, task, device))
                for name, task in tasks.items()
            },
            "speedup_over": speedups(times),
        }


def costs(name: str, task: Prepare, device: torch.device) -> Row:
    on_gpu = device.type == "cuda"
    return {
        "launches": count_launches(task) if on_gpu else None,
        "operators": count_operators(task) if name == "eager" else None,
        "peak_mib": peak_bytes(task) / 2**20 if on_gpu else None,
    }


def run(options: argparse.Namespace, device: torch.device, console: Console) -> Row:
    """Everything that was asked for, as it goes into the JSON."""
    torch.manual_seed(0)
    chosen = cases(options.models, options.batches, options.kernels)
    clock = clock_of(device)
    budget_s = TINY_BUDGET_S if options.tiny else BUDGET_S
    rows: list[Row] = []
    too_large: list[Case] = []
    for case in track(chosen, "timing", console=console):
        # Compiling is most of a tiny run's time, so there it is done once a shape.
        compiles = not options.tiny or case.pairs == max(options.batches)
        try:
            rows += list(measure(case, clock, budget_s, compiles, console))
        except torch.OutOfMemoryError:
            too_large.append(case)
            console.print(f"out of memory: {case.kernel}, {case.shape}", style="yellow")
    summary = summarise(rows, [(case.kernel, case.model, case.pairs) for case in too_large])
    result = {
        "benchmark": "kernels",
        **provenance(device),
        "tiny": options.tiny,
        "note": NOTES[device.type],
        "ours": OURS[device.type],
        "caches": clock.caches,
        "out_of_memory": [f"{case.kernel}, {case.model}, {case.shape}" for case in too_large],
        "summary": summary,
        "rows": rows,
    }
    if device.type == "cpu":
        drop_absolutes(rows + summary)
        return result
    bandwidth = copy_bandwidth(clock)
    add_bandwidth(rows + summary, bandwidth)
    return {"copy_gb_per_s": bandwidth, "empty_ms": empty_ms(clock), **result}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small shapes and batches")
    parser.add_argument("--kernels", default="", help="only those whose name contains this")
    parser.add_argument("--models", nargs="+", choices=NETWORKS, help="all but the tiny one")
    parser.add_argument("--batches", type=int, nargs="+", help="in pairs; two images each")
    parser.add_argument("--out", type=Path, help="JSON; benchmarks/results/kernels_<device>.json")
    options = parser.parse_args(arguments)
    if not (options.tiny or torch.cuda.is_available()):
        parser.error("no CUDA device, and a CPU takes hours for these shapes: give --tiny")
    if options.tiny:
        options.models = options.models or [TINY_MODEL]
        options.batches = options.batches or TINY_BATCHES
    options.models = options.models or [name for name in NETWORKS if name != TINY_MODEL]
    if options.batches and min(options.batches) < 1:
        parser.error(f"--batches {min(options.batches)}: a batch has at least one pair")
    if not cases(options.models, options.batches, options.kernels):
        parser.error(f"--kernels {options.kernels}: no kernel's name contains this")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=None if sys.stdout.isatty() else 150)
    result = run(options, device, Console(stderr=True))
    name = "_".join(["kernels", slug(result["device"]["name"]), *["tiny"] * options.tiny])
    out = options.out or RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(result))
    console.print(f"{result['note']}\n{out}")
    for plot in draw_all(result, out.with_suffix("")):
        console.print(str(plot))
    return 0


if __name__ == "__main__":
    sys.exit(main())
