"""Loads all that `make gpu` loads, with nothing there but what benchmarks/gpu/README.md takes to be
there and the wheels that it brings: other libraries of this machine are hidden.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
THERE = ("torch", "triton", "accelerate", "huggingface_hub", "matplotlib", "rich", "pytest")
WHEELS = (ROOT / "benchmarks" / "gpu" / "wheels.txt").read_text().splitlines()
PARTS = ("bench_kernels", "bench_step", "gpu.each_kernel", "gpu.profile_real_step", "gpu.report")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_all_they_need(names: Iterable[str]) -> set[str]:
    found: set[str] = set()
    left = list(map(plain, names))
    while left:
        if (name := left.pop()) not in found:
            found.add(name)
            try:
                needed = [line for line in requires(name) or () if "extra ==" not in line]
            except PackageNotFoundError:  # for another machine than this
                continue
            left += [plain(re.split(r"[^\w.-]", line, maxsplit=1)[0]) for line in needed]
    return found


brought = {plain(line) for line in WHEELS if not line.startswith("#")} | {"deepspeed", "cdpo"}
known = with_all_they_need(THERE) | brought
hidden = {
    module
    for module, owners in packages_distributions().items()
    if not known.intersection(map(plain, owners)) and not (ROOT / module).exists()
}


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name.partition(".")[0] not in hidden:
            return super().find_spec(name, path, target)
        return None


assert "pyarrow" in hidden
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
for module in PARTS:
    importlib.import_module(module)
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "tests/kernels"]))
