"""The history of the step benchmark: one row a run, a plot of it, and what fell since the last row.

    python benchmarks/bench_step.py --history benchmarks/results/history.jsonl    adds a row
    PYTHONPATH=benchmarks python -m step_bench.history         draws it again, and says what fell

A row has date, commit, device, versions and the figures of each model. Rows of a CPU hold ratios
only: a step that does more than it did shows there too.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from kernel_bench.plots import COLORS, MORE_COLORS, STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring.provenance import ROOT

Row = dict[str, Any]
HISTORY = ROOT / "benchmarks" / "results" / "history.jsonl"
# More is better, for each; a spread of p20, median and p80.
FIGURES = {"pairs_per_s": "pairs/s", "speedup": "speedup over the straightforward step"}


def row_of(result: Row) -> Row:
    """What is kept of a run of `bench_step.py`."""
    device = {key: result["device"][key] for key in ("type", "name", "driver")}
    return {
        **{key: result[key] for key in ("date", "commit")},
        "device": device,
        "versions": result["versions"],
        "tiny": result["tiny"],
        "figures": {model["model"]: _figures_of(model) for model in result["models"]},
    }


def _figures_of(model: Row) -> Row:
    ours = model["steps"]["ours"]
    figures = {"pairs": model["pairs"], "precision": model["precision"]}
    for key in ("pairs_per_s", "share_of_peak", "peak_gib"):
        if ours.get(key) is not None:
            figures[key] = ours[key]
    return figures | {"speedup": model["speedup"], "units_per_pair": ours["units_per_pair"]}


def record(result: Row, path: Path) -> list[str]:
    """Append a run and draw all of them; returns lines that say what fell, and where the plot is.

    Raises:
        ValueError: for a history that cannot be read, before anything is written to it.
    """
    rows = [*read(path), row_of(result)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(rows[-1]) + "\n")
    return [*verdict(rows), str(draw(rows, path.with_suffix(".png")))]


def read(path: Path) -> list[Row]:
    """All rows, oldest first; none if there is no file yet."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from None
    return rows


def verdict(rows: list[Row]) -> list[str]:
    """What the newest row says against the last one of the same device."""
    newest = rows[-1]
    device = newest["device"]["name"]
    earlier = [row for row in rows[:-1] if _comparable(row, newest)]
    if not earlier:
        return [f"first row of {device}: nothing to compare with"]
    last = earlier[-1]
    since = f"since {last['date'][:10]} ({last['commit']})"
    found = fallen(last, newest)
    return [f"{line} {since}" for line in found] or [f"no figure of {device} fell {since}"]


def fallen(last: Row, newest: Row) -> list[str]:
    """Figures that fell by more than their spread in either row, 20th to 80th percentile.

    A figure of the last row that the newest lacks counts as fallen. Throughput at another number of
    pairs or another precision is not compared.
    """
    lines = []
    for model, before in last["figures"].items():
        after = newest["figures"].get(model, {})
        same = all(before[key] == after.get(key) for key in ("pairs", "precision"))
        for key, title in FIGURES.items():
            if key not in before:
                continue
            if key not in after:
                lines.append(f"{model}: {title} is missing")
            elif same and _fell(before[key], after[key]):
                old, new = before[key]["median"], after[key]["median"]
                lines.append(f"{model}: {title} fell from {old:.3g} to {new:.3g}")
            elif not same and key == "pairs_per_s":
                lines.append(f"{model}: {title} not compared, the step is another one")
    return lines


def _comparable(row: Row, newest: Row) -> bool:
    same_device = row["device"]["name"] == newest["device"]["name"]
    return same_device and row["tiny"] == newest["tiny"]


def _fell(before: Row, after: Row) -> bool:
    spread = max(figure["p80"] - figure["p20"] for figure in (before, after))
    return before["median"] - after["median"] > spread


def draw(rows: list[Row], path: Path) -> Path:
    """Throughput on GPUs, and the speedup on every device, over the runs; a column a model."""
    models = list(dict.fromkeys(model for row in rows for model in row["figures"]))
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    palette = (*COLORS.values(), *MORE_COLORS)
    colors = {kind: palette[at % len(palette)] for at, kind in enumerate(kinds)}
    measured = [
        key for key in FIGURES if any(key in f for row in rows for f in row["figures"].values())
    ]
    with matplotlib.rc_context(STYLE):
        size = (3.2 * len(models) + 0.8, 2.1 * len(measured) + 1.2)
        figure = Figure(size, layout="constrained")
        panels = figure.subplots(len(measured), len(models), squeeze=False, sharex=True)
        for line, key in zip(panels, measured, strict=True):
            for axes, model in zip(line, models, strict=True):
                for kind, color in colors.items():
                    _draw_figure(axes, rows, kind, model, key, color)
                axes.margins(x=0.1)
                axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
            line[0].set_ylabel(FIGURES[key].replace(" over ", "\nover "))
        for axes, model in zip(panels[0], models, strict=True):
            axes.set_title(model, fontsize=10, loc="left")
        for axes in panels[-1]:
            labels = [_label(row) for row in rows]
            axes.set_xticks(range(len(rows)), labels, rotation=30, ha="right", fontsize=7)
        handles, labels = _legend(panels.flat)
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
        figure.savefig(path, dpi=150, facecolor="white")
    return path


def _kind(row: Row) -> str:
    return row["device"]["name"] + (", tiny models" if row["tiny"] else "")


def _label(row: Row) -> str:
    return f"{row['date'][:10]} {str(row['commit'])[:7]}"


def _draw_figure(axes: Axes, rows: list[Row], kind: str, model: str, key: str, color: str) -> None:
    """The spreads of one figure on one device, each where its row stands among all."""
    points = [
        (at, row["figures"][model][key])
        for at, row in enumerate(rows)
        if _kind(row) == kind and key in row["figures"].get(model, {})
    ]
    if not points:
        return
    at = [number for number, _ in points]
    low, middle, high = ([f[name] for _, f in points] for name in ("p20", "median", "p80"))
    axes.vlines(at, low, high, color=color, linewidth=1.2)
    axes.plot(at, middle, color=color, marker="o", markersize=4, label=kind)


def _legend(panels: Any) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("jsonl", type=Path, nargs="?", default=HISTORY)
    path = parser.parse_args(arguments).jsonl
    rows = read(path)
    if not rows:
        parser.error(f"{path} has no rows: bench_step.py --history {path} adds one")
    print("\n".join([*verdict(rows), str(draw(rows, path.with_suffix(".png")))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
