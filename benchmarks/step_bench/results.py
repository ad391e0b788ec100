"""Measurements of training steps: the rows of the JSON, and the tables on the terminal.

A model's row:

    model, pairs, precision
    unit_flops     of one forward of the denoiser over one image: one unit
    vae_units      of encoding one image
    text_units     of encoding one prompt
    steps          "ours" and "straightforward" -> what a step took, `step_row`
    speedup        time of the straightforward step over ours, round by round
    knobs          name -> time with this one thing changed over ours, and what it changes besides

On a CPU times say nothing and are left out: counts and ratios remain.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from measuring.timing import Spread
from rich.table import Table
from step_bench.counts import NOMINAL_TFLOPS

Row = dict[str, Any]
NOTES = {
    "cuda": "wall time of whole steps, launches included; of peak: of the nominal dense bf16 peak "
    "of the device, where it is known and the step is in bf16",
    "cpu": "ratios of processor time, and counts: tiny models, and times of a CPU say nothing by "
    "themselves",
}
ABSOLUTE = ("ms", "pairs_per_s", "units_per_s", "tflop_per_s", "share_of_peak")


def step_row(
    times_ms: list[float],
    *,
    pairs: int,
    flops: int,
    unit_flops: int,
    calls: Mapping[str, list[int]],
    peak_gib: float | None,
    peak_tflops: float | None,
) -> Row:
    """What one step took: times, operations executed, calls of networks, memory at its peak."""
    per_second = Spread.of([1e3 / ms for ms in times_ms])
    tflops = flops / 1e12 * per_second.median
    return {
        "ms": Spread.of(times_ms)._asdict(),
        "pairs_per_s": Spread(*(pairs * rate for rate in per_second))._asdict(),
        "units_per_pair": flops / unit_flops / pairs,
        "units_per_s": flops / unit_flops * per_second.median,
        "tflop_per_s": tflops,
        "share_of_peak": None if peak_tflops is None else tflops / peak_tflops,
        "peak_gib": peak_gib,
        "calls": dict(calls),
    }


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Nominal dense bf16; None where it is not known or not what the step is held to."""
    return NOMINAL_TFLOPS.get(device_name) if precision == "bf16" else None


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Row:
    """Of repetitions of the same round."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])._asdict()


def drop_absolutes(row: Row) -> Row:
    """A model's row without what a CPU has nothing to say about."""
    steps = {
        name: {key: value for key, value in step.items() if key not in ABSOLUTE}
        for name, step in row["steps"].items()
    }
    return row | {"steps": steps}


def steps_table(result: Row) -> Table:
    on_gpu = result["device"]["type"] == "cuda"
    shown = Table(title=f"Training steps on {result['device']['name']}", caption=result["note"])
    shown.add_column("model")
    shown.add_column("step")
    for name in ["pairs/s", "units/s", "of peak", "peak GiB"] * on_gpu:
        shown.add_column(name, justify="right")
    shown.add_column("units a pair", justify="right")
    shown.add_column("network calls (images or prompts)")
    shown.add_column("speedup")
    for row in result["models"]:
        for name, step in row["steps"].items():
            model = f"{row['model']}, {row['pairs']} pairs, {row['precision']}"
            costs = _gpu_costs(step) if on_gpu else []
            speedup = spread_text(row["speedup"]) if name == "ours" else ""
            units = f"{step['units_per_pair']:.2f}"
            shown.add_row(
                model * (name == "ours"), name, *costs, units, calls_text(step["calls"]), speedup
            )
    return shown


def _gpu_costs(step: Row) -> list[str]:
    share = "–" if step["share_of_peak"] is None else f"{step['share_of_peak']:.1%}"
    pairs = f"{step['pairs_per_s']['median']:.2f}"
    return [pairs, f"{step['units_per_s']:.1f}", share, f"{step['peak_gib']:.1f}"]


def knobs_table(result: Row) -> Table:
    """Rows are knobs, columns models."""
    shown = Table(
        title="Our step with one thing changed: time ÷ time of our step",
        caption="median [20th, 80th percentile]; above 1: slower than our step. Memory where it is "
        "measured",
    )
    shown.add_column("changed")
    for row in result["models"]:
        shown.add_column(row["model"], justify="right")
    for name in dict.fromkeys(name for row in result["models"] for name in row["knobs"]):
        shown.add_row(name, *(_knob_text(row["knobs"].get(name)) for row in result["models"]))
    return shown


def _knob_text(knob: Row | None) -> str:
    if knob is None:
        return "–"
    if knob["time"] is None:
        return str(knob["failed"])
    memory = "" if knob["peak_gib"] is None else f", {knob['peak_gib']:.1f} GiB"
    return spread_text(knob["time"]) + memory


def spread_text(spread: Row) -> str:
    return f"{spread['median']:.2f} [{spread['p20']:.2f}, {spread['p80']:.2f}]"


def calls_text(calls: Mapping[str, Sequence[int]]) -> str:
    """How often each network is called, and on how many: `policy 1×4, teacher 4×2`."""
    parts = []
    for name, sizes in calls.items():
        for size in dict.fromkeys(sizes):
            parts.append(f"{name} {sizes.count(size)}×{size}")
    return ", ".join(parts)
