"""One plot a kernel from the JSON of `bench_kernels.py`: speed and bandwidth by batch.

PYTHONPATH=benchmarks python -m kernel_bench.plots benchmarks/results/kernels_DEVICE.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from measuring.provenance import slug

Row = dict[str, Any]
COLORS = {"ours": "#0969da", "eager": "#d1571c", "compiled": "#1a7f38"}
MORE_COLORS = ("#8250df", "#6e7782")  # of further baselines
TITLES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#d8dee4",
    "axes.labelcolor": "#1f2328",
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.6,
    "text.color": "#1f2328",
    "xtick.color": "#6e7782",
    "ytick.color": "#6e7782",
    "legend.frameon": False,
}


def draw_all(result: Row, folder: Path) -> list[Path]:
    """Write a PNG for every kernel into the folder, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kernel in dict.fromkeys(row["kernel"] for row in result["summary"]):
        rows = [row for row in result["summary"] if row["kernel"] == kernel]
        paths.append(folder / f"{slug(kernel)}.png")
        with matplotlib.rc_context(STYLE):
            draw(result, rows).savefig(paths[-1], dpi=150, facecolor="white")
    return paths


def draw(result: Row, rows: list[Row]) -> Figure:
    """A column a model; a row a phase, and one for the share of a copy's bandwidth if known."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    phases = [phase for phase in TITLES if any(row["phase"] == phase for row in rows)]
    on_gpu = result["device"]["type"] == "cuda"
    num_rows = len(phases) + on_gpu
    figure = Figure((max(3.2 * len(models), 5.2) + 0.4, 1.9 * num_rows + 1.1), layout="constrained")
    panels = figure.subplots(num_rows, len(models), squeeze=False, sharex="col", sharey="row")
    for column, model in enumerate(models):
        mine = [row for row in rows if row["model"] == model]
        for axes, phase in zip(panels[:, column], phases, strict=False):
            draw_speed(axes, [row for row in mine if row["phase"] == phase])
        if on_gpu:
            draw_share(panels[-1, column], [row for row in mine if row["phase"] == phases[-1]])
        panels[0, column].set_title(model, fontsize=10, loc="left")
        panels[-1, column].set_xlabel("batch (pairs)")
    for axes, phase in zip(panels[:, 0], phases, strict=False):
        speed_axis(axes, TITLES[phase])
    if on_gpu:
        share_axis(panels[-1, 0], TITLES[phases[-1]])
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        found = zip(*axes.get_legend_handles_labels(), strict=True)
        handles = {label: handle for handle, label in found} | handles
    figure.get_layout_engine().set(w_pad=0.1)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    where = f"{result['device']['name']}, {result['date'][:10]}; ours: {result['ours']}"
    figure.suptitle(f"{rows[0]['kernel']}\n{where}", fontsize=10)
    return figure


def draw_speed(axes: Axes, rows: list[Row]) -> None:
    """Time of the others over ours, with the band from the 20th to the 80th percentile."""
    axes.axhline(1, color=COLORS["ours"], linewidth=1, linestyle=(0, (4, 3)), label="ours")
    for name, color in colors(rows).items():
        present = [row for row in rows if name in row["speedup_over"]]
        pairs = [row["pairs"] for row in present]
        spread = [row["speedup_over"][name] for row in present]
        low, middle, high = ([s[key] for s in spread] for key in ("p20", "median", "p80"))
        axes.fill_between(pairs, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(pairs, middle, color=color, marker="o", markersize=3.5, label=name)
    pairs_axis(axes, rows)


def draw_share(axes: Axes, rows: list[Row]) -> None:
    """Bytes that have to be moved over time, as a share of what a large copy reaches."""
    for name, color in ({"ours": COLORS["ours"]} | colors(rows)).items():
        present = [row for row in rows if name in row["implementations"]]
        share = [row["implementations"][name]["share_of_copy"] for row in present]
        pairs = [row["pairs"] for row in present]
        axes.plot(pairs, share, color=color, marker="o", markersize=3.5, label=name)
    pairs_axis(axes, rows)


def colors(rows: list[Row]) -> dict[str, str]:
    """Everything that is compared with ours, with its colour."""
    names = dict.fromkeys(name for row in rows for name in row["speedup_over"])
    more = iter(MORE_COLORS)
    return {name: COLORS.get(name) or next(more) for name in sorted(names, key=_known_first)}


def _known_first(name: str) -> int:
    return list(COLORS).index(name) if name in COLORS else len(COLORS)


def speed_axis(axes: Axes, title: str) -> None:
    """Logarithmic, so that twice as fast and half as fast are as far from ours."""
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.5), max(high, 2))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: times(value)))
    axes.set_ylabel(f"{title}\ntime ÷ our time")


def times(value: float) -> str:
    """A power of two as a factor: 4×, 1/4×."""
    return f"{value:.0f}×" if value >= 1 else f"1/{1 / value:.0f}×"


def share_axis(axes: Axes, title: str) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_ylabel(f"{title}\nshare of copy bandwidth")


def pairs_axis(axes: Axes, rows: list[Row]) -> None:
    pairs = [row["pairs"] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs, [str(number) for number in pairs])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(length=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", type=Path)
    path = parser.parse_args().json
    for plot in draw_all(json.loads(path.read_text()), path.with_suffix("")):
        print(plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
