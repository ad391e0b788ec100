"""A plot of the data benchmark: speeds over the plain tar loop, and resuming by position."""

import math
from pathlib import Path
from typing import Any

import matplotlib
from kernel_bench.plots import COLORS, STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]


def draw(result: Row, path: Path) -> Path:
    """Write a PNG and return its path."""
    with matplotlib.rc_context(STYLE):
        figure = Figure((13.5, 3.1), layout="constrained")
        reading, workers, resuming, full = figure.subplots(1, 4)
        bars(reading, result["reading"])
        reading.set_title("reading, processor time", fontsize=9, loc="left")
        bars(workers, result["workers"])
        workers.set_title("reading, wall time", fontsize=9, loc="left")
        for axes in (reading, workers):
            axes.set_xlabel("speed ÷ plain tar loop's")
        by_position(resuming, result["resuming"], "of_start", "resuming: time ÷ that at the start")
        title = "resuming, default sizes: seconds on this CPU"
        by_position(full, result["resuming_default_sizes"], "seconds", title)
        figure.suptitle(f"Data path: {result['processor']}, {result['date'][:10]}", fontsize=10)
        figure.savefig(path, dpi=150, facecolor="white")
    return path


def bars(axes: Axes, rows: Row) -> None:
    for at, (name, row) in enumerate(rows.items()):
        spread = row["speed"]
        color = COLORS["ours"] if name.startswith("ours") else COLORS["eager"]
        axes.barh(at, spread["median"], height=0.6, color=color, alpha=0.85)
        axes.plot([spread["p20"], spread["p80"]], [at, at], color="#1f2328", linewidth=1)
        axes.annotate(
            f"{spread['median']:.2f}",
            (spread["p80"], at),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(visible=False, axis="y")
    axes.tick_params(length=0)


def by_position(axes: Axes, rows: Row, key: str, title: str) -> None:
    spreads = [row[key] for row in rows.values()]
    places = range(len(rows))
    middle = [spread["median"] for spread in spreads]
    below = [spread["median"] - spread["p20"] for spread in spreads]
    above = [spread["p80"] - spread["median"] for spread in spreads]
    axes.errorbar(places, middle, [below, above], fmt="o-", color=COLORS["ours"], capsize=2)
    axes.set_xticks(places, [power_of_ten(int(step)) for step in rows])
    axes.set_ylim(0, max(2.0, 1.2 * max(spread["p80"] for spread in spreads)))
    axes.set_xlabel("optimiser step resumed at")
    axes.set_title(title, fontsize=9, loc="left")


def power_of_ten(step: int) -> str:
    return f"$10^{{{round(math.log10(step))}}}$" if step else "0"
