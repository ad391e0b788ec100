"""Measurements as rows of the JSON, their summary over a UNet, and the table on the terminal.

A row is one kernel at one shape in one phase:

    kernel, model, pairs, shape, count, phase    count: how often a UNet's forward runs the shape
    bytes                                        that have to be read and written at the least
    error                                        of ours and eager against float64, if compared
    implementations                              name -> what it took
    speedup_over                                 name -> its time over ours, round by round

A summary row puts all shapes of a UNet's forward together, each with its count. On a CPU times and
bandwidths say nothing about the kernels and are left out: ratios remain.
"""

from collections.abc import Collection, Iterable, Mapping
from statistics import median
from typing import Any

from measuring.timing import Spread, Times
from rich.table import Table

Row = dict[str, Any]
PHASES = ("forward", "backward", "both")
NAMES = ("ours", "eager", "compiled")  # every case has the first two
GROUP = ("kernel", "model", "pairs", "phase")
OURS = {"cuda": "Triton kernels", "cpu": "PyTorch paths of the kernels, not Triton"}
NOTES = {
    "cuda": "times in ms; share_of_copy is of the bandwidth of a 1 GiB copy in the same run",
    "cpu": "ratios only: times of a CPU, and of paths that no GPU takes, say nothing by themselves",
}
ABSOLUTE = ("ms", "host_ms", "gb_per_s", "share_of_copy")


def implementation_row(times: Times, **costs: int | None) -> Row:
    """What one implementation took for one shape in one phase."""
    return {"ms": Spread.of(times.device)._asdict(), "host_ms": median(times.host), **costs}


def speedups(times: Mapping[str, Times]) -> dict[str, dict[str, float]]:
    """How many times as long as ours the others take, by repetitions of the same round."""
    ours = times["ours"].device
    return {
        name: Spread.of([a / b for a, b in zip(other.device, ours, strict=True)])._asdict()
        for name, other in times.items()
        if name != "ours"
    }


def summarise(rows: Iterable[Row], incomplete: Collection[tuple[str, str, int]] = ()) -> list[Row]:
    """One row a kernel, model, batch and phase; none for what lacks a shape."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    return [_summary(group) for key, group in groups.items() if key[:3] not in incomplete]


def _summary(rows: list[Row]) -> Row:
    shared = set.intersection(*(set(row["implementations"]) for row in rows))
    names = [name for name in rows[0]["implementations"] if name in shared]
    return {
        **{key: rows[0][key] for key in GROUP},
        "shapes": len(rows),
        "bytes": sum(row["count"] * row["bytes"] for row in rows),
        "implementations": {name: _add(rows, name) for name in names},
        "speedup_over": {name: _mean_speedup(rows, name) for name in names if name != "ours"},
    }


def _add(rows: list[Row], name: str) -> Row:
    parts = [(row["count"], row["implementations"][name]) for row in rows]

    def total(*path: str) -> Any:
        values = []
        for count, value in parts:
            for key in path:
                value = value[key]
            values.append(None if value is None else count * value)
        return None if None in values else sum(values)

    peaks = [part["peak_mib"] for _, part in parts]
    return {
        "ms": {quantile: total("ms", quantile) for quantile in Spread._fields},
        "host_ms": total("host_ms"),
        "launches": total("launches"),
        "operators": total("operators"),
        "peak_mib": None if None in peaks else max(peaks),
    }


def _mean_speedup(rows: list[Row], name: str) -> dict[str, float]:
    """All their time over all of ours: the harmonic mean, weighted by their time."""
    weights = [row["count"] * row["implementations"][name]["ms"]["median"] for row in rows]
    speed = [row["speedup_over"][name] for row in rows]
    return {
        quantile: sum(weights) / sum(w / s[quantile] for w, s in zip(weights, speed, strict=True))
        for quantile in Spread._fields
    }


def add_bandwidth(rows: Iterable[Row], copy_gb_per_s: float) -> None:
    """Put GB/s, and its share of a copy's, into the rows."""
    for row in rows:
        for part in row["implementations"].values():
            part["gb_per_s"] = row["bytes"] / part["ms"]["median"] / 1e6
            part["share_of_copy"] = part["gb_per_s"] / copy_gb_per_s


def drop_absolutes(rows: Iterable[Row]) -> None:
    """Take out of the rows what a CPU's run has nothing to say about."""
    for row in rows:
        for part in row["implementations"].values():
            for key in ABSOLUTE:
                part.pop(key, None)


def table(result: Row) -> Table:
    """The summary rows of a result, as in the JSON."""
    on_gpu = result["device"]["type"] == "cuda"
    shown = Table(
        title=f"Kernels on {result['device']['name']}; ours: {result['ours']}",
        caption="eager, compiled, others: times as long as ours, median [20th, 80th percentile]; "
        "layers: all of one UNet forward",
    )
    for name in (*GROUP, "eager", "compiled", "others"):
        shown.add_column(name, justify="right" if name == "pairs" else "left")
    columns = ("ms", "of copy", "launches", "MiB") if on_gpu else ("eager operators",)
    for name in columns:
        shown.add_column(name, justify="right")
    for row in result["summary"]:
        names = list(row["speedup_over"])
        others = [f"{name} {_ratio(row, name)}" for name in names if name not in NAMES]
        ratios = [*(_ratio(row, name) for name in NAMES[1:]), "\n".join(others)]
        costs = _gpu_costs(row) if on_gpu else [str(row["implementations"]["eager"]["operators"])]
        shown.add_row(*(str(row[key]) for key in GROUP), *ratios, *costs)
    return shown


def _ratio(row: Row, name: str) -> str:
    spread = row["speedup_over"].get(name)
    if spread is None:
        return "-"
    return f"{spread['median']:.2f} [{spread['p20']:.2f}, {spread['p80']:.2f}]"


def _gpu_costs(row: Row) -> list[str]:
    """Time, share and memory of ours; launches of ours, eager and compiled."""
    parts = row["implementations"]
    ours = parts["ours"]
    launches = " / ".join(str(parts[name]["launches"]) for name in NAMES if name in parts)
    time, share = f"{ours['ms']['median']:.3f}", f"{ours['share_of_copy']:.0%}"
    return [time, share, launches, f"{ours['peak_mib']:.0f}"]
