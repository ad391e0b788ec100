"""Every kernel compiles to machine code for three GPU generations, without any spill."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from cdpo.kernels.dispatch import HAS_TRITON, INTERPRETED

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETED, reason="compiles kernels, of which this process has none"),
]


@pytest.fixture
def compile_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compile_report")


def run(compile_report, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compile_report.py", *arguments])
    return compile_report.main()


@pytest.mark.timeout(1200)  # 30 seconds of processor time if nothing is in Triton's cache
@pytest.mark.parametrize(
    "generations", [[90], pytest.param([80, 90, 100], marks=pytest.mark.long)], ids=["one", "all"]
)
def test_machine_code_without_spills(compile_report, monkeypatch, tmp_path, generations):
    report = tmp_path / "report.json"
    arguments = ("--json", str(report), "--sm", *map(str, generations))
    assert run(compile_report, monkeypatch, *arguments) == 0
    rows = json.loads(report.read_text())["rows"]
    assert {row["sm"] for row in rows} == set(generations)
    assert all(row["cubin_bytes"] > 0 for row in rows)
    assert all(row["spills"] == row["stack"] == 0 for row in rows)
    # Four programs of four warps an SM; in float32, which is no training precision of a GPU, three.
    halves = [row["registers"] for row in rows if "fp32" not in row["kernel"]]
    assert max(halves) <= 128 and max(row["registers"] for row in rows) <= 168
    assert max(row["shared"] for row in rows) <= 48 * 1024
    names = " ".join(row["kernel"] for row in rows)
    files = (ROOT / "kernels").rglob("*.py")
    kernels = [
        path.parent.name if path.stem == "op" else path.stem
        for path in files
        if "def compile_specs" in path.read_text()
    ]
    assert len(kernels) >= 2
    assert all(kernel in names for kernel in kernels)
    assert all(dtype in names for dtype in ("bf16", "fp16", "fp32"))


def test_a_spill_fails_the_report(compile_report, monkeypatch, capsys):
    spilling = {"registers": 255, "spills": 8, "stack": 8}
    monkeypatch.setattr(compile_report, "ptxas_usage", lambda ptx, sm: spilling)
    assert run(compile_report, monkeypatch, "--sm", "90", "--kernels", "philox") == 1
    assert "spills: philox_normal on sm_90" in capsys.readouterr().err


def test_sizes_of_one_compile(compile_report):
    """Triton makes a constant of an integer argument that is 1; methods of tensors then fail."""
    specs = {spec.kernel: spec for spec in compile_report.collect_specs()}
    assert len(specs) >= 8
    for spec in specs.values():
        sizes = [name for name, kind in spec.signature.items() if kind == "i32"]
        ones = spec.constants | dict.fromkeys(sizes, 1)
        compile_report.compile_spec(spec._replace(constants=ones), 90)
