"""Runs the Triton half of the kernel tests in the interpreter, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cdpo.kernels.dispatch import HAS_TRITON, INTERPRETED

HERE = Path(__file__).parent
# Two thirds of the time; the same holds on PyTorch, and here for other kernels or dtypes. Whole
# networks are in files that import diffusers, which the core need not.
HEAVY = (
    "(opcheck or graph_breaks) and not philox or convergence or test_fuse or without_triton"
    " or group_norm and (oracle or deterministic)"
)
NETWORKS = ("test_fuse.py", "test_convergence.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("half", "left_out"),
    [(f"not ({HEAVY})", NETWORKS), pytest.param(f"({HEAVY})", (), marks=pytest.mark.long)],
    ids=["core", "heavy"],
)
@pytest.mark.timeout(1200)  # 40 seconds of processor time, but every test of this folder
@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
@pytest.mark.skipif(
    INTERPRETED, reason="this process is interpreted: its tests are the Triton half"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton tests ran on the GPU")
def test_triton_half(half: str, left_out: tuple[str, ...]) -> None:
    options = ["-q", "-k", f"triton and {half}", "-p", "no:cacheprovider", "--confcutdir", HERE]
    options += [f"--ignore={HERE / name}" for name in left_out]
    command = [sys.executable, "-m", "pytest", *options, HERE]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr
    assert passed is not None
    assert int(passed[1]) >= 25  # a half that selects next to nothing says nothing
