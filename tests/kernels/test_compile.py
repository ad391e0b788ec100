"""Every kernel compiles to machine code for three GPU generations, without any spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cdpo.kernels.dispatch import HAS_TRITON

REPORT = Path(__file__).parents[2] / "benchmarks" / "compile_report.py"
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, for kernels cannot be both interpreted and compiled in one."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(REPORT), *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True)


@pytest.mark.timeout(1200)  # 30 seconds of processor time if nothing is in Triton's cache
@pytest.mark.parametrize(
    "generations", [[90], pytest.param([80, 90, 100], marks=pytest.mark.long)], ids=["one", "all"]
)
def test_machine_code_without_spills(tmp_path, generations):
    report = tmp_path / "report.json"
    done = run("--json", str(report), "--sm", *map(str, generations))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert {row["sm"] for row in rows} == set(generations)
    assert all(row["cubin_bytes"] > 0 for row in rows)
    assert all(row["spills"] == row["stack"] == 0 for row in rows)
    assert max(row["registers"] for row in rows) <= 128
    assert max(row["shared"] for row in rows) <= 48 * 1024
    names = " ".join(row["kernel"] for row in rows)
    files = (REPORT.parents[1] / "kernels").rglob("*.py")
    kernels = [
        path.parent.name if path.stem == "op" else path.stem
        for path in files
        if "def compile_specs" in path.read_text()
    ]
    assert len(kernels) >= 2
    assert all(kernel in names for kernel in kernels)
    assert all(dtype in names for dtype in ("bf16", "fp16", "fp32"))


SPILLING = """
import sys
sys.path.insert(0, {folder!r})
import compile_report
compile_report.ptxas_usage = lambda ptx, sm: dict(registers=255, spills=8, stack=8)
sys.argv = ["compile_report.py", "--sm", "80", "--kernels", "philox"]
sys.exit(compile_report.main())
"""


def test_a_spill_fails_the_report():
    code = SPILLING.format(folder=str(REPORT.parent))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "spills: philox_normal on sm_80" in done.stderr


SIZES_OF_ONE = """
import sys
sys.path.insert(0, {folder!r})
import compile_report
for spec in {{spec.kernel: spec for spec in compile_report.collect_specs()}}.values():
    sizes = [name for name, kind in spec.signature.items() if kind == "i32"]
    ones = spec.constants | dict.fromkeys(sizes, 1)
    compile_report.compile_spec(spec._replace(constants=ones), 90)
    print(spec.name)
"""


def test_sizes_of_one_compile():
    """Triton makes a constant of an integer argument that is 1; methods of tensors then fail."""
    code = SIZES_OF_ONE.format(folder=str(REPORT.parent))
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=inherited, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) >= 8
