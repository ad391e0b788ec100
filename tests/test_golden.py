"""The small world's first losses, to the last bit: a refactor may not change them.

Sampling, ranking, sharding and training of the committed model, run on one thread, without oneDNN,
whose convolutions are blocked by the size of the caches, and with MKL's path for processors of all
makers. The file's first line names the processor it was written on: there the losses are compared
exactly, on another one to a ten-thousandth (1e-5 was seen between two makers before oneDNN was left
out). After a change that is meant to alter the arithmetic, write the file anew with

    CDPO_WRITE_GOLDEN=1 python -m pytest tests/test_golden.py
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, losses

GOLDEN = ROOT / "tests" / "assets" / "losses" / "emoji_cdpo.txt"
SHORT = [
    "prompts.limit=6",
    "prepare.candidates_per_prompt=6",
    "prepare.sampler.steps=4",
    "train.steps=12",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.sample_every=0",
    "train.threads=1",
    "curriculum.steps_per_tier=2",
    "checkpoint.every=100",
]
SAME_ARITHMETIC = {
    "OMP_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
}
WITHOUT_ONEDNN = """
import runpy, sys, torch
torch.backends.mkldnn.enabled = False
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def processor() -> str:
    """The make of this machine's processor, as /proc/cpuinfo names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the golden file is of x86-64")
def test_the_losses_of_the_small_world(tmp_path: Path) -> None:
    for verb in ("prepare", "train"):
        command = [sys.executable, "-c", WITHOUT_ONEDNN, f"engine/{verb}.py"]
        outcome = subprocess.run(
            [*command, "--recipe", "recipes/emoji_cdpo.yaml", f"run_dir={tmp_path}", *SHORT],
            cwd=ROOT,
            env=os.environ | SAME_ARITHMETIC,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = losses(tmp_path)
    if os.environ.get("CDPO_WRITE_GOLDEN"):
        GOLDEN.write_text("\n".join([processor(), *map(float.hex, found)]) + "\n")
    made_on, *golden = GOLDEN.read_text().splitlines()
    if made_on == processor():
        assert list(map(float.hex, found)) == golden
    assert found == pytest.approx([float.fromhex(loss) for loss in golden], rel=1e-4)
