"""The quality benchmark's tables, for a terminal."""

from __future__ import annotations

from typing import Any

from cdpo.engine.reporting.stats import Estimate
from cdpo.engine.reporting.wording import signed_interval
from quality_plan import METHODS
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def show(result: Row, console: Console) -> None:
    """Both tables, and what is missing."""
    if result["table"]:
        console.print(_methods(result["table"]))
    if result["ablations"]:
        console.print(_ablations(result["ablations"]))
    if result["unfinished"]:
        console.print(f"not finished: {', '.join(result['unfinished'])}")


def _methods(rows: list[Row]) -> Table:
    table = Table(title="tuned minus base, and in brackets minus DPO; 95 % intervals over prompts")
    for heading in ("model", "ranked by", "prompts", "scorer", "base", *METHODS):
        table.add_column(heading)
    for row in rows:
        if row["method"] != "base":
            continue
        place = [row[key] for key in ("model", "reward", "prompts", "scorer")]
        own = {
            other["method"]: other
            for other in rows
            if [other[key] for key in ("model", "reward", "prompts", "scorer")] == place
        }
        table.add_row(*place, f"{row['mean']['mean']:.4f}", *(_cell(own[m]) for m in METHODS))
        if place[2:] == ["held-out", "reward"]:
            table.add_section()
    return table


def _cell(row: Row) -> str:
    gain = _interval(row["over_base"])
    return f"{gain}\n({_interval(row['over_dpo'])})" if "over_dpo" in row else gain


def _interval(estimate: Row) -> str:
    return signed_interval(Estimate(**estimate))


def _ablations(rows: list[Row]) -> Table:
    table = Table(title="one knob at a time: tuned minus base")
    for heading in ("knob", "value", "prompts", "judge", "reward", "KL proxy", "diversity"):
        table.add_column(heading)
    for row in rows:
        if row["scorer"] != "judge":
            continue
        same = ("knob", "value", "prompts")
        reward = next(
            other
            for other in rows
            if other["scorer"] == "reward" and all(other[key] == row[key] for key in same)
        )
        table.add_row(
            row["knob"],
            f"{row['value']:g}",
            row["prompts"],
            _interval(row["over_base"]),
            _interval(reward["over_base"]),
            _number(row["divergence"]),
            _number(row["diversity"]),
        )
    return table


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
