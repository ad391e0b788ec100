"""What `bench_gpu.py` measured, as the tables of docs/performance.md; a dash where nothing was.

PYTHONPATH=benchmarks python -m gpu.report RESULTS    writes them into docs/performance.md
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cdpo.engine.models.quantization import LIBRARIES
from gpu.parts import KERNEL_MODELS, KNOBS, MODELS
from measuring.provenance import ROOT

DOCS = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- measured on a GPU: begin -->\n", "<!-- measured on a GPU: end -->\n"
NONE = "–"
STEPS = (
    *("model", "pairs a step", "ours, pairs/s", "of peak", "peak GiB", "straightforward, pairs/s"),
    *(head for _, head in KNOBS.values()),
    "rounding free",
)
KERNELS = (
    *("kernel", "model", "pairs", "ms", "of a copy's bandwidth", "eager ÷ ours"),
    "compiled ÷ ours",
)
BASES = (f"base of {MODELS['flux']}", "peak GiB, text encoders and VAE included", "time")

Row = dict[str, Any]


def tables(results: Path | None) -> str:
    """Markdown of all tables; ``results`` is a folder that parts have written to, or None."""
    steps = _markdown(STEPS, (_step_cells(model, results) for model in MODELS))
    kernels = _markdown(KERNELS, _kernel_cells(results))
    caption = "Knobs: time ÷ time of our step; above 1 is slower.\n"
    bases = _markdown(BASES, _base_cells(results))
    return f"{_where(results)}\n{steps}\n{caption}\n{bases}\n{kernels}"


def write(results: Path | None, docs: Path = DOCS) -> None:
    """Put the tables between the marks of the page."""
    before, rest = docs.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    docs.write_text(f"{before}{BEGIN}{tables(results)}{END}{after}", encoding="utf-8")


def _where(results: Path | None) -> str:
    found = list(_read_all(results, "step_*.json", "kernels_*.json"))
    if not found:
        return "Not measured yet: `make gpu` fills these tables.\n"
    device, versions = found[0]["device"], found[0]["versions"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    commits = ", ".join(dict.fromkeys(str(each["commit"]) for each in found))
    return f"{device['name']}, driver {device['driver']}, {names}; commit {commits}.\n"


def _step_cells(model: str, results: Path | None) -> list[str]:
    row = _model_row(results, f"step_{model}")
    steps = row.get("steps", {})
    ours, other = steps.get("ours", {}), steps.get("straightforward", {})
    knobs = [_model_row(results, f"step_{model}_{kind}").get("knobs", {}) for kind in KNOBS]
    return [
        MODELS[model],
        str(row.get("pairs", NONE)),
        _rate(ours),
        NONE if ours.get("share_of_peak") is None else f"{ours['share_of_peak']:.0%}",
        _gib(ours),
        _rate(other),
        *(", ".join(map(_time, found.values())) or NONE for found in knobs),
        _slowed(ours, _model_row(results, f"step_{model}_rounding")),
    ]


def _base_cells(results: Path | None) -> Iterator[list[str]]:
    """What a base in fewer bits saves, and costs."""
    row = _model_row(results, "step_flux_quantised")
    whole = row.get("steps", {}).get("ours", {})
    yield ["whole", _gib(whole), "1.00" if whole else NONE]
    for kind in LIBRARIES:
        knob = row.get("knobs", {}).get(f"base in {kind}")
        yield [kind, _gib(knob or {}), _time(knob) if knob else NONE]


def _kernel_cells(results: Path | None) -> Iterator[list[str]]:
    """Of each kernel and model the largest batch, backward pass included where there is one."""
    names = [f"kernels_{model}_*.json" for model in KERNEL_MODELS]
    rows = [row for result in _read_all(results, *names) for row in result["summary"]]
    keys = list(dict.fromkeys((row["kernel"], row["model"]) for row in rows))
    if not keys:
        yield [NONE] * len(KERNELS)
    for kernel, model in keys:
        row = max(
            (row for row in rows if (row["kernel"], row["model"]) == (kernel, model)),
            key=lambda row: (row["pairs"], row["phase"] == "both", row["phase"] == "forward"),
        )
        ours = row["implementations"]["ours"]
        measured = "ms" in ours  # not on a CPU
        yield [
            kernel,
            model,
            str(row["pairs"]),
            f"{ours['ms']['median']:.3f}" if measured else NONE,
            f"{ours['share_of_copy']:.0%}" if measured else NONE,
            *(_spread(row["speedup_over"].get(name)) for name in ("eager", "compiled")),
        ]


def _rate(step: Row) -> str:
    return f"{step['pairs_per_s']['median']:.1f}" if "pairs_per_s" in step else NONE


def _slowed(ours: Row, row: Row) -> str:
    """By how much our step of another part takes longer a pair."""
    changed = row.get("steps", {}).get("ours", {})
    if not ("pairs_per_s" in ours and "pairs_per_s" in changed):
        return NONE
    return f"{ours['pairs_per_s']['median'] / changed['pairs_per_s']['median']:.2f}"


def _gib(step: Row) -> str:
    return NONE if step.get("peak_gib") is None else f"{step['peak_gib']:.1f}"


def _time(knob: Row) -> str:
    return _spread(knob["time"]) if knob["time"] is not None else str(knob["failed"])


def _spread(spread: Row | None) -> str:
    return NONE if spread is None else f"{spread['median']:.2f}"


def _model_row(results: Path | None, name: str) -> Row:
    found = next(_read_all(results, f"{name}.json"), None)
    row: Row = found["models"][0] if found else {}
    return row


def _read_all(results: Path | None, *patterns: str) -> Iterator[Row]:
    """Results of parts, in the order of their names."""
    for pattern in patterns if results is not None else ():
        for path in sorted(results.glob(pattern)):
            found = json.loads(path.read_text())
            if "benchmark" in found:
                yield found


def _markdown(heads: Iterable[str], rows: Iterable[list[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="folder that `bench_gpu.py` wrote to")
    options = parser.parse_args(arguments)
    write(options.results)
    print(tables(options.results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
