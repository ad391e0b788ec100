"""Times our training step beside the straightforward one of the same loss, and each of our knobs.

    python benchmarks/bench_step.py             on a GPU: all of step_bench/models.py
    python benchmarks/bench_step.py --tiny      small models: five to eight minutes on a CPU
    python benchmarks/bench_step.py --count     real sizes, counted and not run: needs no GPU

Weights are random. Two steps at a time take turns in one process; operations and calls of networks
are counted while they run. `step_bench/ours.py` and `straightforward.py` are the two steps,
`step_bench/results.py` tells what the JSON holds, `step_bench/history.py` keeps the figures.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from cdpo.engine.basics.errors import RecipeError
from cdpo.engine.models.quantization import LIBRARIES
from measuring.device_costs import peak_bytes
from measuring.provenance import ROOT, provenance, slug
from measuring.timing import StepClock, take_turns
from rich.console import Console
from rich.progress import track
from step_bench.counts import count_flops, counted_calls
from step_bench.history import record
from step_bench.models import REAL, TINY, StepModel
from step_bench.ours import PRECISIONS, Knobs, NotCaptured, OurStep
from step_bench.plot import draw
from step_bench.results import (
    NOTES,
    Row,
    calls_text,
    drop_absolutes,
    knobs_table,
    peak_tflops,
    ratio,
    step_row,
    steps_table,
)
from step_bench.setup import Pairs, make_pairs
from step_bench.straightforward import StraightforwardStep, straightforward
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError

RESULTS = ROOT / "benchmarks" / "results"
# Seconds of one comparison: of the two steps, and of a knob.
BUDGET_S, TINY_BUDGET_S = (20.0, 8.0), (12.0, 3.0)


class Alternative(NamedTuple):
    """A step that is built and has been taken, so that all its memory is allocated."""

    step: OurStep | StraightforwardStep
    resident: int
    """Bytes on the GPU between its steps."""

    @classmethod
    def of(cls, make: Callable[[], OurStep | StraightforwardStep]) -> "Alternative":
        before = _allocated()
        step = make()
        step()
        return cls(step, _allocated() - before)

    def peak_gib(self) -> float | None:
        """Memory of a step at its peak, networks and optimizer included; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        return (self.resident + peak_bytes(lambda: self.step)) / 2**30


def _allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def variants(model: StepModel, knobs: Knobs, on_gpu: bool, compiles: bool) -> dict[str, Knobs]:
    """Our step with one thing changed at a time, of those things that its denoiser has."""
    fused = "layers not fused" if knobs.fused_layers else "layers fused"
    order = "contiguous images" if knobs.channels_last else "channels_last"
    precision = "fp32" if knobs.precision == "bf16" else "bf16"
    of_unets = {
        fused: replace(knobs, fused_layers=not knobs.fused_layers),
        order: replace(knobs, channels_last=not knobs.channels_last),
    }
    changed = {
        "latents encoded live": replace(knobs, cached_latents=False),
        "text encoded live": replace(knobs, cached_text=False),
        # Two draws: after three steps, which are not timed, all of them are kept
        "frozen passes kept": replace(knobs, frozen_cache=2),
        "reference a second copy": replace(knobs, twin_reference=False),
        **({} if model.spec.is_flow else of_unets),
        "activation checkpointing": replace(knobs, checkpointing=True),
        precision: replace(knobs, precision=precision),
    }
    if on_gpu:  # on a CPU they are in PyTorch
        changed["loss and noise in PyTorch"] = replace(knobs, kernels="torch")
        changed["captured as CUDA graphs"] = replace(knobs, captured=True)
        if not model.spec.is_flow:  # whose layers stay as diffusers has them
            changed["attention by the engine's rule"] = replace(knobs, attention="auto")
    for kind in LIBRARIES if model.spec.is_flow else ():
        changed[f"base in {kind}"] = replace(knobs, quantization=kind)
    if compiles:
        changed["blocks compiled"] = replace(knobs, compiled=True)
    return changed


class Comparison:
    """Everything about one model at one number of pairs."""

    def __init__(
        self, name: str, model: StepModel, count: int, device: torch.device, knobs: Knobs
    ) -> None:
        self.name, self.model, self.device, self.knobs = name, model, device, knobs
        self.pairs: Pairs = make_pairs(model, count, device)
        self.clock = StepClock(device)
        self.ours = Alternative.of(lambda: self._our_step(knobs))
        self.unit_flops, self.vae_units = units_of(self.ours.step)

    def measure(self, budget_s: float) -> Row:
        """The row of the model, without its knobs."""
        dtype = PRECISIONS[self.knobs.precision]
        other = Alternative.of(lambda: straightforward(self.model, self.pairs, self.device, dtype))
        alternatives = {"ours": self.ours, "straightforward": other}
        tasks = {name: lambda step=each.step: step for name, each in alternatives.items()}
        times = take_turns(tasks, self.clock, budget_s)
        on_gpu = self.device.type == "cuda"
        device_name = torch.cuda.get_device_name(self.device) if on_gpu else "CPU"
        return {
            "model": self.name,
            "pairs": len(self.pairs),
            "precision": self.knobs.precision,
            "unit_flops": self.unit_flops,
            "vae_units": self.vae_units,
            "text_units": text_flops_of(other.step) / self.unit_flops,
            "steps": {
                name: step_row(
                    times[name].device,
                    pairs=len(self.pairs),
                    unit_flops=self.unit_flops,
                    **counts_of(each.step),
                    peak_gib=each.peak_gib(),
                    peak_tflops=peak_tflops(device_name, self.knobs.precision),
                )
                for name, each in alternatives.items()
            },
            "speedup": ratio(times["straightforward"].device, times["ours"].device),
        }

    def measure_knob(self, changed: Knobs, budget_s: float) -> Row:
        """Our step with one thing changed, over our step; or why it could not be taken."""
        try:
            other = Alternative.of(lambda: self._our_step(changed))
            tasks = {"ours": lambda: self.ours.step, "changed": lambda: other.step}
            times = take_turns(tasks, self.clock, budget_s)
        except torch.OutOfMemoryError:
            return {"time": None, "failed": "out of memory"}
        except (TorchDynamoException, InductorError, RecipeError):
            return {"time": None, "failed": "does not compile here"}
        except NotCaptured:
            return {"time": None, "failed": "cannot be captured here"}
        except ImportError as error:
            return {"time": None, "failed": f"needs {error.name}"}
        return {
            "time": ratio(times["changed"].device, times["ours"].device),
            "peak_gib": other.peak_gib(),
        }

    def _our_step(self, knobs: Knobs) -> OurStep:
        return OurStep(self.model, self.pairs, self.device, knobs)


def counts_of(step: OurStep | StraightforwardStep) -> Row:
    """Operations and network calls of one step."""
    with counted_calls(step.networks()) as calls:
        flops = count_flops(step)
    return {"flops": flops, "calls": calls}


def units_of(step: OurStep) -> tuple[int, float]:
    """Operations of one unit, and the units of encoding one image."""
    batch = step.batch()
    unit = count_flops(lambda: step.predict(batch))
    return unit, count_flops(lambda: step.encode_images(step.pairs.pixels[:1])) / unit


def text_flops_of(step: StraightforwardStep) -> float:
    """Operations of encoding one prompt."""
    return count_flops(lambda: step.encode_text(step.tokens)) / len(step.pairs)


def halvings(count: int) -> Iterator[int]:
    while count:
        yield count
        count //= 2


def compare(name: str, model: StepModel, options: argparse.Namespace, device: torch.device) -> Row:
    """A model's row, at the largest number of pairs that both steps have the memory for."""
    knobs = Knobs.for_device(device, model)
    knobs = replace(knobs, free_rounding=options.rounding == "free")
    both_s, knob_s = TINY_BUDGET_S if options.tiny else BUDGET_S
    for count in halvings(options.pairs or model.pairs):
        try:
            comparison = Comparison(name, model, count, device, knobs)
            row = comparison.measure(both_s)
            break
        except torch.OutOfMemoryError:
            comparison = None
        torch.cuda.empty_cache()  # outside `except`, whose traceback holds the tensors
    else:
        raise SystemExit(f"{name}: one pair does not fit the memory of the device")
    changed = variants(model, knobs, device.type == "cuda", options.compile)
    row["knobs"] = {
        knob: comparison.measure_knob(each, knob_s)
        for knob, each in track(changed.items(), name, console=Console(stderr=True))
        if options.knobs and options.knob in knob
    }
    return drop_absolutes(row) if device.type == "cpu" else row


def run(options: argparse.Namespace, device: torch.device) -> Row:
    """Everything that was asked for, as it goes into the JSON."""
    models = TINY if options.tiny else REAL
    return {
        "benchmark": "step",
        **provenance(device),
        "tiny": options.tiny,
        "rounding": options.rounding,
        "note": NOTES[device.type],
        "models": [compare(name, models[name], options, device) for name in options.models],
    }


def count_real(names: list[str], console: Console) -> None:
    """Units and calls of one pair at real size, without computing anything."""
    meta = torch.device("meta")
    for name in names:
        model, knobs = REAL[name], Knobs("bf16", fused_layers=False, channels_last=False)
        pairs = make_pairs(model, 1, meta)
        ours = OurStep(model, pairs, meta, knobs)
        ours.batch()  # embeds the prompts: from here on they are cached
        unit, vae_units = units_of(ours)
        other = straightforward(model, pairs, meta, torch.bfloat16)
        text_units = text_flops_of(other) / unit
        console.print(
            f"{name}: unit {unit / 1e12:.3f} TFLOP, VAE {vae_units:.2f} units an image, "
            f"text {text_units:.2f} a prompt",
            highlight=False,
        )
        for kind, step in (("ours", ours), ("straightforward", other)):
            counts = counts_of(step)
            units = f"{counts['flops'] / unit:.2f} units a pair"
            console.print(f"  {kind}: {units}; {calls_text(counts['calls'])}", highlight=False)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models")
    parser.add_argument("--count", action="store_true", help="count at real size, time nothing")
    parser.add_argument("--models", nargs="+", choices=REAL, default=list(REAL))
    parser.add_argument("--pairs", type=int, help="in a step; fewer if they do not fit")
    parser.add_argument("--no-knobs", dest="knobs", action="store_false", help="the two steps only")
    parser.add_argument("--knob", default="", help="only those whose name contains this")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="the step under torch.compile as well, minutes more; by default on a GPU",
    )
    parser.add_argument(
        "--rounding",
        choices=("fixed", "free"),
        default="fixed",
        # No knob beside the others: cuDNN keeps to what a process has chosen, timed or not.
        help="speed.rounding of all that is measured here",
    )
    parser.add_argument("--out", type=Path, help="JSON; benchmarks/results/step_<device>.json")
    parser.add_argument("--history", type=Path, help="JSON lines that the figures are added to")
    options = parser.parse_args(arguments)
    if options.pairs is not None and options.pairs < 1:
        parser.error(f"--pairs {options.pairs}: a step has at least one pair")
    on_gpu = torch.cuda.is_available()
    if not (options.tiny or options.count or on_gpu):
        parser.error("no CUDA device, and a CPU takes hours at these sizes: give --tiny or --count")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 150)
    if options.count:
        count_real(options.models, console)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = run(options, device)
    name = "_".join(["step", slug(result["device"]["name"]), *["tiny"] * options.tiny])
    out = options.out or RESULTS / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    console.print(steps_table(result))
    if options.knobs:
        console.print(knobs_table(result))
    console.print(f"{out}\n{draw(result, out.with_suffix('.png'))}")
    for line in record(result, options.history) if options.history else ():
        console.print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
