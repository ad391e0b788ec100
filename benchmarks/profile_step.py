"""Where the time of a training step goes: a trace of real steps, and what stands in it.

    python benchmarks/profile_step.py --recipe recipes/emoji_cdpo.yaml [--steps N] [--out DIR]
                                      [dotted.key=value ...]

Trains from the start of the recipe on its shards, in a run folder that is thrown away, and records
the N steps after a warm-up. Leaves `trace.json.gz` for https://ui.perfetto.dev in DIR (by default
`profile` in the run folder) and prints the phases of a step, the costliest operators, on a GPU also
its kernels and how often the host waits for it, and the command that takes one kernel to ncu.
"""

import argparse
import shlex
import sys
import tempfile
from pathlib import Path

import torch
from cdpo.engine.basics.errors import CdpoError
from cdpo.engine.basics.phases import PHASES
from cdpo.engine.display.terminal import Terminal
from cdpo.engine.ranks import Ranks
from cdpo.engine.ranks.launch import joined_ranks, quieten_libraries
from cdpo.engine.recipe import Recipe
from cdpo.engine.recipe.reading import load_recipe
from step_bench.trace import PhaseTotals, StepTrace, read_trace
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 3  # steps in which kernels are compiled, algorithms chosen and memory gathered
TOP, WIDTH = 15, 60  # lines of a table, characters of a name
LOSS_KERNEL = "forward_kernel"  # of kernels/paired_dpo_loss/: launched once a micro-batch


def shortened(recipe: Recipe, run_dir: Path, num_steps: int) -> Recipe:
    """The recipe for so many steps on the shards it has, without samples, in another folder."""
    train = {"steps": num_steps, "sample_every": 0}
    checkpoint = {"every": num_steps}
    return recipe.model_copy(
        update={
            "run_dir": str(run_dir),
            "data": recipe.data.model_copy(update={"path": recipe.shards_at}),
            "train": recipe.train.model_copy(update=train),
            "checkpoint": recipe.checkpoint.model_copy(update=checkpoint),
        }
    )


def take_steps(ranks: Ranks, recipe: Recipe, terminal: Terminal, profiler: profile | None) -> None:
    """The real trainer's steps, each told to the profiler if there is one."""
    from cdpo.engine.training.trainer import Trainer  # after quieten_libraries: it imports them

    trainer = Trainer(ranks, recipe, terminal)
    if profiler is None:
        trainer.run()
        return
    with profiler:
        trainer.run(after_step=profiler.step)


def new_profiler(num_steps: int, device: torch.device) -> profile:
    on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    return profile(
        activities=[ProfilerActivity.CPU, *on_gpu],
        schedule=schedule(wait=0, warmup=WARM_UP, active=num_steps, repeat=1),
    )


# What is printed


def show_phases(terminal: Terminal, trace: StepTrace, on_gpu: bool) -> None:
    columns = ["phase", "calls", "host ms", "share", *["GPU ms", "GPU share", "waits"] * on_gpu]
    whole = PhaseTotals(trace.num_steps, trace.host_ms, trace.device_ms, trace.waits)
    rows = []
    for name, phase in {**trace.phases, "step": whole}.items():
        row = [name, *row_of(phase.calls, phase.host_ms, whole.host_ms, trace)]
        if on_gpu:
            row += row_of(phase.waits, phase.device_ms, whole.device_ms, trace)[1:]
            row += [f"{phase.waits / trace.num_steps:g}"]
        rows.append(row)
    terminal.table("Phases of a step", columns, rows)


def show_operators(terminal: Terminal, profiler: profile, trace: StepTrace, on_gpu: bool) -> None:
    """The operators that cost most themselves, not in what they call."""
    where, whole = ("device", trace.device_ms) if on_gpu else ("cpu", trace.host_ms)
    costs = {
        average.key: (average.count, getattr(average, f"self_{where}_time_total") / 1e3)
        for average in profiler.key_averages()
        if average.device_type == DeviceType.CPU
        and average.key not in PHASES
        and not average.key.startswith("ProfilerStep")
    }
    top = sorted(costs.items(), key=lambda item: item[1][1], reverse=True)[:TOP]
    columns = ["operator", "calls", "GPU ms" if on_gpu else "host ms", "share"]
    rows = [[name[:WIDTH], *row_of(*cost, whole, trace)] for name, cost in top]
    terminal.table("Operators, without what they call", columns, rows)


def show_device(terminal: Terminal, trace: StepTrace) -> None:
    """Kernels, how busy the GPU is, and how often the host waits for it."""
    rows = [
        [name[:WIDTH], *row_of(kernel.calls, kernel.device_ms, trace.device_ms, trace)]
        for name, kernel in list(trace.kernels.items())[:TOP]
    ]
    terminal.table("Kernels", ["kernel", "calls", "GPU ms", "share"], rows)
    terminal.line(
        f"in a step the GPU is busy {trace.busy_ms / trace.host_ms:.0%} of the time, the host "
        f"waits for it {trace.waits / trace.num_steps:g} times and copies from it "
        f"{trace.copies_to_host / trace.num_steps:g} times"
    )


def row_of(calls: int, total_ms: float, whole_ms: float, trace: StepTrace) -> list[str]:
    """Calls and milliseconds of a step, and the share of the whole."""
    share = f"{total_ms / whole_ms:.1%}" if whole_ms else "–"
    return [f"{calls / trace.num_steps:g}", f"{total_ms / trace.num_steps:.2f}", share]


def ncu_command(trace: StepTrace, out: Path, kernel: str | None, arguments: list[str]) -> str:
    """The command that measures one launch of a kernel, after the warm-up, with Nsight Compute.

    Without a name: of the kernel that takes the GPU longest, or of our loss where none was seen.
    Nsight Compute and the profiler cannot both hold the GPU's counters, so the latter stays off.
    """
    if kernel is None:
        kernel = next(iter(trace.kernels), LOSS_KERNEL)
    seen = trace.kernels[kernel].calls if kernel in trace.kernels else trace.phases["loss"].calls
    skip = WARM_UP * seen // trace.num_steps
    options = ["--set", "full", "--kernel-name", f"regex:^{kernel}$", "--launch-skip", str(skip)]
    options += ["--launch-count", "1", "--force-overwrite", "-o", str(out / kernel)]
    script = ["python", "benchmarks/profile_step.py", *arguments, "--no-profiler"]
    return shlex.join(["ncu", *options, *script])


def run(ranks: Ranks, options: argparse.Namespace, recipe: Recipe, terminal: Terminal) -> None:
    with tempfile.TemporaryDirectory(prefix="profile_step_") as folder:
        recipe_here = shortened(recipe, Path(folder), WARM_UP + options.steps)
        if options.no_profiler:
            take_steps(ranks, recipe_here, terminal, None)
            return
        profiler = new_profiler(options.steps, ranks.device)
        take_steps(ranks, recipe_here, terminal, profiler)
    out = options.out or Path(recipe.run_dir) / "profile"
    out.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(out / "trace.json.gz"))
    trace = read_trace(out / "trace.json.gz")
    on_gpu = ranks.device.type == "cuda"
    show_phases(terminal, trace, on_gpu)
    show_operators(terminal, profiler, trace, on_gpu)
    if on_gpu:
        show_device(terminal, trace)
    else:
        terminal.line(
            "no GPU here: on one there are also its time in each phase, its kernels, and how often "
            "the host waits for it"
        )
    terminal.line(f"trace: {out / 'trace.json.gz'} (open it at https://ui.perfetto.dev)")
    arguments = ["--recipe", options.recipe, "--steps", str(options.steps), *options.overrides]
    terminal.line(f"one kernel: {ncu_command(trace, out, options.kernel, arguments)}")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a number of steps: give 1 or more")
    return number


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--steps", type=positive, default=10, help="steps recorded (default 10)")
    parser.add_argument("--out", type=Path, help="folder of the trace (default RUN_DIR/profile)")
    parser.add_argument("--kernel", help="kernel that the ncu command is for")
    parser.add_argument(
        "--no-profiler", action="store_true", help="take the steps alone, for ncu or nsys"
    )
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value")
    options = parser.parse_intermixed_args()
    quieten_libraries()
    terminal = Terminal()
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        with joined_ranks(recipe.train.threads) as ranks:
            run(ranks, options, recipe, terminal)
    except CdpoError as error:
        terminal.error(str(error))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
