"""The small world's first losses, to the last bit: a refactor may not change them.

Sampling, ranking, sharding and training of the committed model, run on one thread with the
instruction set held at AVX2, so that every x86-64 machine computes alike. After a change that is
meant to alter the arithmetic, write the file anew with

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
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "AVX2,STRICT",
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the golden file is of x86-64")
def test_the_losses_of_the_small_world(tmp_path: Path) -> None:
    for verb in ("prepare", "train"):
        command = [sys.executable, f"engine/{verb}.py", "--recipe", "recipes/emoji_cdpo.yaml"]
        outcome = subprocess.run(
            [*command, f"run_dir={tmp_path}", *SHORT],
            cwd=ROOT,
            env=os.environ | SAME_ARITHMETIC,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = [f"{step} {loss.hex()}" for step, loss in enumerate(losses(tmp_path), start=1)]
    if os.environ.get("CDPO_WRITE_GOLDEN"):
        GOLDEN.write_text("\n".join(found) + "\n")
    assert found == GOLDEN.read_text().splitlines()
