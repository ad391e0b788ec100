"""A plot of a step benchmark: the straightforward step and every knob, as times over our step."""

from pathlib import Path
from typing import Any

import matplotlib
from kernel_bench.plots import COLORS, STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]
OTHER, KNOB = COLORS["eager"], "#6e7782"
STRAIGHTFORWARD = "straightforward loop"


def draw(result: Row, path: Path) -> Path:
    """Write a PNG with a panel a model, and return its path."""
    models = result["models"]
    bars = [bars_of(row) for row in models]
    names = list(dict.fromkeys(name for each in bars for name in each))
    with matplotlib.rc_context(STYLE):
        size = (3.1 * len(models) + 1.8, 0.27 * len(names) + 1.5)
        figure = Figure(size, layout="constrained")
        panels = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
        for axes, row, spreads in zip(panels, models, bars, strict=True):
            draw_bars(axes, names, spreads)
            axes.set_title(title_of(row), fontsize=10, loc="left")
        panels[0].set_yticks(range(len(names)), names)
        panels[0].invert_yaxis()
        panels[0].tick_params(axis="y", labelcolor="#1f2328")
        kind = "tiny models, " if result["tiny"] else ""
        figure.suptitle(
            f"Time ÷ time of our step: {kind}{result['device']['name']}, {result['date'][:10]}",
            fontsize=10,
        )
        figure.supxlabel("median; whiskers from the 20th to the 80th percentile", fontsize=9)
        figure.savefig(path, dpi=150, facecolor="white")
    return path


def bars_of(row: Row) -> dict[str, Row]:
    """Spreads of the ratios that were measured, by what is compared with our step."""
    knobs = {name: knob["time"] for name, knob in row["knobs"].items() if knob["time"]}
    return {STRAIGHTFORWARD: row["speedup"]} | knobs


def title_of(row: Row) -> str:
    """The model; beneath it our throughput, where one was measured."""
    ours = row["steps"]["ours"]
    lines = [f"{row['model']}, {row['pairs']} pairs, {row['precision']}"]
    if "pairs_per_s" in ours:
        share = ours["share_of_peak"]
        of_peak = "" if share is None else f", {share:.0%} of peak"
        lines.append(f"{ours['pairs_per_s']['median']:.1f} pairs/s{of_peak}")
    return "\n".join(lines)


def draw_bars(axes: Axes, names: list[str], spreads: dict[str, Row]) -> None:
    """Bars from 1: to the right what is slower than our step, to the left what is faster."""
    axes.axvline(1, color=COLORS["ours"], linewidth=1.2)
    for at, name in enumerate(names):
        if name not in spreads:
            continue
        low, middle, high = (spreads[name][key] for key in ("p20", "median", "p80"))
        color = OTHER if name == STRAIGHTFORWARD else KNOB
        axes.barh(at, middle - 1, left=1, height=0.62, color=color, alpha=0.85)
        axes.plot([low, high], [at, at], color="#1f2328", linewidth=1)
        axes.annotate(
            f"{middle:.2f}",
            (max(high, 1), at),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.margins(x=0.2)
    axes.grid(visible=False, axis="y")
    axes.tick_params(length=0)
