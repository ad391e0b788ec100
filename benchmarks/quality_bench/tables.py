"""The quality benchmark's tables, for a terminal."""

from __future__ import annotations

from typing import Any

from cdpo.engine.basics.estimates import Estimate
from cdpo.engine.comparing.report.wording import signed_interval
from quality_bench.plan import METHODS, PLAIN
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


PLACE = ("model", "reward", "prompts", "scorer")


def show(result: Row, console: Console) -> None:
    """All tables, and what is missing."""
    if result["table"]:
        console.print(_gains(result["table"], "over_base", "tuned minus base", list(METHODS)))
        others = [name for name in METHODS if name != PLAIN]
        console.print(_gains(result["table"], "over_dpo", f"tuned minus {PLAIN}", others))
    if result["ablations"]:
        console.print(_ablations(result["ablations"]))
    if result["unfinished"]:
        console.print(f"not finished: {', '.join(result['unfinished'])}")


def _gains(rows: list[Row], key: str, title: str, methods: list[str]) -> Table:
    table = Table(title=f"{title}; 95 % intervals over prompts")
    for heading in ("model", "ranked by", "prompts", "scorer", "base", *methods):
        table.add_column(heading)
    for place in dict.fromkeys(tuple(row[part] for part in PLACE) for row in rows):
        own = {row["method"]: row for row in rows if tuple(row[part] for part in PLACE) == place}
        base = f"{own['base']['mean']['mean']:.4g}"
        table.add_row(*place, base, *(interval(own[method][key]) for method in methods))
        if place[2:] == ("held-out", "reward"):
            table.add_section()
    return table


def interval(estimate: Row) -> str:
    """An estimate as JSON has it, for people."""
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
            interval(row["over_base"]),
            interval(reward["over_base"]),
            _number(row["divergence"]),
            _number(row["diversity"]),
        )
    return table


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"
