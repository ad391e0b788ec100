"""Plots of the quality benchmark: every method's gain over the base, and the ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from kernel_bench.plots import COLORS, STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quality_bench.plan import DEFAULT, METHODS, PLAIN

Row = dict[str, Any]
PROMPTS = {"training": COLORS["ours"], "held-out": COLORS["eager"]}
SCORERS = {"judge": COLORS["ours"], "reward": COLORS["compiled"]}
PANELS = (
    ("clip", "judge"),
    ("clip", "reward"),
    ("colorfulness", "reward"),
    ("colorfulness", "judge"),
)
MODELS = {"sd": "diffusion", "lcm": "LCM, one step"}
KNOBS = {"B": "tiers B", "K": "steps a tier K", "M": "candidates M", "beta": "β"}
PATHS = {"beta": (DEFAULT, COLORS["ours"]), f"{PLAIN}-beta": (PLAIN, COLORS["eager"])}


def draw(result: Row, out: Path) -> list[Path]:
    """Write a PNG of each part that there is something of, beside the JSON; their paths."""
    paths = []
    with matplotlib.rc_context(STYLE):
        for part, figure_of in (("table", methods), ("ablations", ablations)):
            if result[part]:
                paths.append(out.with_name(f"{out.stem}_{part}.png"))
                figure_of(result[part]).savefig(paths[-1], dpi=150, facecolor="white")
    return paths


def methods(rows: list[Row]) -> Figure:
    """A row of panels a model; gains over the base with 95 % intervals."""
    models = [model for model in MODELS if any(row["model"] == model for row in rows)]
    panels = [
        (reward, scorer)
        for reward, scorer in PANELS
        if any((row["reward"], row["scorer"]) == (reward, scorer) for row in rows)
    ]
    size = (3.1 * len(panels) + 1.2, 2.2 * len(models) + 0.7)
    figure = Figure(size, layout="constrained")
    grid = figure.subplots(len(models), len(panels), squeeze=False, sharey=True)
    for line, model in zip(grid, models, strict=True):
        for axes, (reward, scorer) in zip(line, panels, strict=True):
            own = [
                row
                for row in rows
                if (row["model"], row["reward"], row["scorer"]) == (model, reward, scorer)
            ]
            gains(axes, own)
            axes.set_title(f"{MODELS[model]}: {scorer}, ranked by {reward}", fontsize=9, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel("tuned − base")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def gains(axes: Axes, rows: list[Row]) -> None:
    for offset, (prompts, color) in zip((-0.14, 0.14), PROMPTS.items(), strict=True):
        found = {row["method"]: row["over_base"] for row in rows if is_gain(row, prompts)}
        places = [at + offset for at, name in enumerate(METHODS) if name in found]
        bars(axes, places, list(found.values()), color, f"{prompts} prompts", vertical=False)
    axes.axvline(0, color="#6e7782", linewidth=0.8)
    axes.set_yticks(range(len(METHODS)), list(METHODS))
    axes.set_ylim(len(METHODS) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def is_gain(row: Row, prompts: str) -> bool:
    return row["prompts"] == prompts and "over_base" in row


def ablations(rows: list[Row]) -> Figure:
    """A panel a knob, and the gain of two methods by how far they went; training prompts."""
    rows = [row for row in rows if row["prompts"] == "training"]
    knobs = [knob for knob in KNOBS if any(row["knob"] == knob for row in rows)]
    figure = Figure((2.6 * (len(knobs) + 1) + 0.6, 2.7), layout="constrained")
    *panels, last = figure.subplots(1, len(knobs) + 1, squeeze=False, sharey=True)[0]
    for axes, knob in zip(panels, knobs, strict=True):
        for scorer, color in SCORERS.items():
            own = in_order(rows, knob, scorer)
            places = [float(row["value"]) for row in own]
            bars(axes, places, [row["over_base"] for row in own], color, scorer, vertical=True)
        ticks = sorted({float(row["value"]) for row in rows if row["knob"] == knob})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_title(KNOBS[knob], fontsize=9, loc="left")
    by_distance(last, rows)
    for axes in (*panels, last):
        axes.axhline(0, color="#6e7782", linewidth=0.8)
    panels[0].set_ylabel("tuned − base, training prompts")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def in_order(rows: list[Row], knob: str, scorer: str) -> list[Row]:
    found = [row for row in rows if (row["knob"], row["scorer"]) == (knob, scorer)]
    return sorted(found, key=lambda row: float(row["value"]))


def by_distance(axes: Axes, rows: list[Row]) -> None:
    """A smaller beta goes further from the base: which method gains more at the same distance?"""
    for knob, (label, color) in PATHS.items():
        own = in_order(rows, knob, "judge")
        places = [float(row["divergence"]) for row in own]
        bars(axes, places, [row["over_base"] for row in own], color, label, vertical=True)
    axes.set_xscale("log")
    axes.set_title("judge by KL proxy, over β", fontsize=9, loc="left")
    axes.legend(fontsize=8, loc="best")


def bars(
    axes: Axes, places: list[float], gains: list[Row], color: str, label: str, *, vertical: bool
) -> None:
    """Means with their intervals, along either axis."""
    means = [gain["mean"] for gain in gains]
    error = [
        [gain["mean"] - gain["low"] for gain in gains],
        [gain["high"] - gain["mean"] for gain in gains],
    ]
    options: dict[str, Any] = {"color": color, "label": label, "capsize": 2, "markersize": 4}
    if vertical:
        axes.errorbar(places, means, yerr=error, fmt="o-", linewidth=1, **options)
    else:
        axes.errorbar(means, places, xerr=error, fmt="o", linewidth=1, **options)
