"""From the comparisons of the evidence benchmark to curves of gain against distance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cdpo.engine.basics.estimates import mean_estimate, paired_difference
from kernel_bench.plots import STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter
from quality_bench.evidence import ARMS, Arm
from quality_bench.plan import Group
from quality_bench.plot import bars
from quality_bench.results import (
    BASE,
    SCORERS,
    Results,
    Scores,
    all_scores,
    mean_of,
    names,
    read_group,
)
from quality_bench.tables import interval
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
PLAIN = {"sd": "DPO", "lcm": "mixed target", "turbo": "own images"}
"""What every other arm of a model is held against at equal distance."""
SETS = ("held-out", "training")
TITLES = {"sd": "diffusion", "lcm": "LCM, two steps", "turbo": "flow, two steps"}
_PAIRS = matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]
COLORS = (*_PAIRS[::2], *_PAIRS[1::2])  # strong ones first
LINEAR = 0.03  # a gain beyond takes a logarithmic scale there: an arm that collapsed leaves room


def collect_curves(models: list[str], seeds: list[int], work: Path) -> Row:
    """Points of every arm that is finished, and arms against the plain one at equal distance."""
    points: list[Row] = []
    equal: list[Row] = []
    for model in models:
        found = {seed: read_group(Group(model, "clip", seed, {}), work) for seed in seeds}
        results = {seed: result for seed, result in found.items() if result is not None}
        for arm, _ in ARMS[model]:
            own = {seed: result for seed, result in results.items() if _has(result, arm)}
            if own:
                points += [{"model": model, **row} for row in _points(own, arm)]
                equal += [{"model": model, **row} for row in _equal(model, own, arm)]
    return {"points": points, "equal_distance": equal}


def _has(result: Row, arm: Arm) -> bool:
    return {name for name, _ in arm.runs()} <= set(names({0: result}))


def _points(results: Results, arm: Arm) -> Iterator[Row]:
    for name, steps in arm.runs():
        for prompts in SETS:
            for scorer in SCORERS:
                base, own = (all_scores(results, prompts, scorer, run) for run in (BASE, name))
                yield {
                    "arm": arm.name,
                    "steps": steps * arm.rounds,
                    "prompts": prompts,
                    "scorer": scorer,
                    "over_base": asdict(paired_difference(base, own)),
                    "of_seeds": {
                        seed: asdict(
                            paired_difference(
                                *(
                                    all_scores({seed: result}, prompts, scorer, run)
                                    for run in (BASE, name)
                                )
                            )
                        )
                        for seed, result in sorted(results.items())
                    },
                    "divergence": mean_of(results, prompts, "divergence", name),
                    "diversity": mean_of(results, prompts, "diversity", name),
                    "diversity_of_base": mean_of(results, prompts, "diversity", BASE),
                }


def _equal(model: str, results: Results, arm: Arm) -> Iterator[Row]:
    """An arm minus the plain one, at the furthest distance that both have reached."""
    plain = next(other for other, _ in ARMS[model] if other.name == PLAIN[model])
    both = {seed: result for seed, result in results.items() if _has(result, plain)}
    if arm == plain or not both:
        return
    for prompts in SETS:
        reach = min(max(_distances(both, prompts, some)) for some in (plain, arm))
        for scorer in SCORERS:
            ours, theirs = (_at(both, prompts, scorer, some, reach) for some in (arm, plain))
            yield {
                "arm": arm.name,
                "against": plain.name,
                "prompts": prompts,
                "scorer": scorer,
                "seeds": sorted(both),
                "divergence": reach,
                "difference": asdict(paired_difference(theirs, ours)),
                "arm_over_base": asdict(mean_estimate(ours)),
                "plain_over_base": asdict(mean_estimate(theirs)),
            }


def _distances(results: Results, prompts: str, arm: Arm) -> list[float]:
    return [mean_of(results, prompts, "divergence", name) or 0.0 for name, _ in arm.runs()]


def _at(results: Results, prompts: str, scorer: str, arm: Arm, reach: float) -> Scores:
    """Gains of an arm's images at a distance: (prompts, images of all seeds), interpolated between
    the two steps nearest to it, the base being the step before the first.
    """
    base = all_scores(results, prompts, scorer, BASE)
    gains = [np.zeros_like(base)]
    gains += [all_scores(results, prompts, scorer, name) - base for name, _ in arm.runs()]
    places = [0.0, *_distances(results, prompts, arm)]
    after = next(index for index, place in enumerate(places) if place >= reach)
    if after == 0:
        return gains[0]
    share = (reach - places[after - 1]) / (places[after] - places[after - 1])
    return (1 - share) * gains[after - 1] + share * gains[after]


def draw_curves(result: Mapping[str, Any], path: Path) -> Path:
    """One figure: a panel for each model and set of prompts, a line an arm; the judge."""
    rows = [row for row in result["points"] if row["scorer"] == "judge"]
    models = [model for model in TITLES if any(row["model"] == model for row in rows)]
    with matplotlib.rc_context(STYLE):
        figure = Figure((9, 3.4 * max(len(models), 1) + 0.4), layout="constrained")
        grid = figure.subplots(max(len(models), 1), len(SETS), squeeze=False)
        for line, model in zip(grid, models, strict=False):
            colors = dict(zip((arm.name for arm, _ in ARMS[model]), COLORS, strict=False))
            for axes, prompts in zip(line, SETS, strict=True):
                place = (model, prompts)
                own = [row for row in rows if (row["model"], row["prompts"]) == place]
                _curves(axes, own, colors)
                axes.set_title(f"{TITLES[model]}: {prompts} prompts", fontsize=9, loc="left")
            line[0].set_ylabel("judge, tuned − base")
            line[-1].legend(fontsize=7, loc="best")
        for axes in grid[-1]:
            axes.set_xlabel("KL proxy")
        figure.savefig(path, dpi=150, facecolor="white")
    return path


def _curves(axes: Axes, rows: list[Row], colors: Mapping[str, str]) -> None:
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["steps"])
        seeds = len(own[0]["of_seeds"])
        label = f"{arm} ({seeds} seed{'s' * (seeds > 1)})"
        places, gains = [row["divergence"] for row in own], [row["over_base"] for row in own]
        bars(axes, places, gains, colors[arm], label, vertical=True)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:.0e}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    if any(abs(row["over_base"]["mean"]) > LINEAR for row in rows):
        axes.set_yscale("symlog", linthresh=LINEAR, linscale=3)
        axes.yaxis.set_major_locator(FixedLocator([-0.1, *np.arange(-0.03, 0.031, 0.01), 0.1]))
        axes.yaxis.set_major_formatter("{x:.2f}")
    axes.axhline(0, color="#6e7782", linewidth=0.8)


def show_curves(result: Mapping[str, Any], console: Console) -> None:
    """Gains by steps, and at equal distance from the base."""
    table = Table(title="tuned minus base; 95 % intervals over prompts")
    for heading in ("model", "arm", "steps", "prompts", "judge", "by seed", "reward", "KL proxy"):
        table.add_column(heading)
    rewards = {_place(row): row for row in result["points"] if row["scorer"] == "reward"}
    for row in result["points"]:
        if row["scorer"] == "judge":
            table.add_row(
                row["model"],
                row["arm"],
                str(row["steps"]),
                row["prompts"],
                interval(row["over_base"]),
                "  ".join(interval(estimate) for estimate in row["of_seeds"].values()),
                interval(rewards[_place(row)]["over_base"]),
                f"{row['divergence']:.2g}",
            )
    console.print(table)
    table = Table(title="at equal distance from the base")
    for heading in ("model", "arm", "against", "prompts", "scorer", "KL proxy", "difference"):
        table.add_column(heading)
    for row in result["equal_distance"]:
        own = (row[key] for key in ("model", "arm", "against", "prompts", "scorer"))
        table.add_row(*own, f"{row['divergence']:.2g}", interval(row["difference"]))
    console.print(table)


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "arm", "steps", "prompts"))
