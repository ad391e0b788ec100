"""Compiles every kernel for three GPU generations, without a GPU, and shows what it costs there.

    python benchmarks/compile_report.py [--sm 80 90 100] [--kernels SUBSTRING] [--json FILE]

A file of `kernels/` takes part by a function `compile_specs()`. Columns, as ptxas reports them:
registers a thread, bytes of register spills (stores + loads), stack bytes a thread, static plus
dynamic shared memory of a program. Leaves with status 1 if any kernel spills.
"""

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have nothing to compile

import cdpo.kernels
import triton
from cdpo.kernels.dispatch import NO_FUSION, CompileSpec
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

COLUMNS = ("registers", "spills", "stack", "shared")


def collect_specs() -> list[CompileSpec]:
    """All specialisations of all kernel files."""
    specs: list[CompileSpec] = []
    for module in pkgutil.walk_packages(cdpo.kernels.__path__, "cdpo.kernels."):
        specs += getattr(importlib.import_module(module.name), "compile_specs", list)()
    return specs


def compile_spec(spec: CompileSpec, sm: int) -> dict[str, Any]:
    """One row of the report. Pointers and sizes are taken as multiples of 16, as in real runs."""
    names = spec.kernel.arg_names
    signature = {
        name: "constexpr" if name in spec.constants else spec.signature[name] for name in names
    }
    constants = {name: value for name, value in spec.constants.items() if name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith(("*", "i"))
    }
    source = ASTSource(spec.kernel, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": spec.num_warps, **NO_FUSION}
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    usage = ptxas_usage(compiled.asm["ptx"], sm)
    usage["shared"] = compiled.metadata.shared
    return {"kernel": spec.name, "sm": sm, **usage, "cubin_bytes": len(compiled.asm["cubin"])}


def ptxas_usage(ptx: str, sm: int) -> dict[str, int]:
    """Registers, spill bytes and stack from `ptxas -v`; a loaded cubin would need a device."""
    arch = sm_arch_from_capability(sm)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(sm).path, "-v", f"--gpu-name={arch}", source, "-o", f"{source}.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        if found is None:
            raise RuntimeError(f"ptxas said nothing that matches {pattern!r}:\n{log}")
        return int(found[1])

    return {
        "registers": number(r"Used (\d+) registers"),
        "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
    }


def show(rows: list[dict[str, Any]], generations: list[int]) -> Table:
    table = Table(title=f"Kernels, compiled with triton {triton.__version__}")
    table.add_column("kernel")
    for sm in generations:
        for column in COLUMNS:
            table.add_column(f"sm_{sm}\n{column}", justify="right")
    for name in dict.fromkeys(row["kernel"] for row in rows):
        cells = [row for row in rows if row["kernel"] == name]
        table.add_row(name, *(str(row[column]) for row in cells for column in COLUMNS))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--kernels", default="", help="only those whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows to this file as well")
    options = parser.parse_args()
    jobs = [(spec, sm) for spec in collect_specs() for sm in options.sm]
    jobs = [(spec, sm) for spec, sm in jobs if options.kernels in spec.name]
    progress = Console(stderr=True)
    rows = [compile_spec(*job) for job in track(jobs, "compiling", console=progress)]
    Console(width=None if sys.stdout.isatty() else 150).print(show(rows, options.sm))
    if options.json:
        options.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))
    spilling = [f"{row['kernel']} on sm_{row['sm']}" for row in rows if row["spills"]]
    for line in spilling:
        print(f"spills: {line}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
