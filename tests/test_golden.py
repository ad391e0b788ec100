"""The small world's first losses, to the last bit: a refactor may not change them.

Sampling, ranking, sharding and training of the committed models, run on one thread, without oneDNN,
whose convolutions are blocked by the size of the caches, and with MKL's path for processors of all
makers. The file's first line names the processor it was written on: there the losses are compared
exactly, on another one to a thousandth (2e-4 was seen between two generations: rounding enters the
loss multiplied by beta / 2). After a change that is meant to alter the arithmetic, write the files
anew with

    CDPO_WRITE_GOLDEN=1 python -m pytest tests/test_golden.py
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT, ForkServer, losses

WITHOUT_ONEDNN = ROOT / "tests" / "workers" / "without_onednn.py"
GOLDEN = ROOT / "tests" / "assets" / "losses"
SHORT = [
    "prompts.limit=6",
    "prepare.candidates_per_prompt=6",
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


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs verbs with that arithmetic."""
    server = ForkServer(tmp_path_factory.mktemp("alike"), SAME_ARITHMETIC)
    yield server
    server.close()


def processor() -> str:
    """This machine's processor: virtual ones go by one name over several generations."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    known = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    fields = ("model name", "cpu family", "model", "stepping")
    return ", ".join(f"{field} {known.get(field, 'unknown')}" for field in fields)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the golden files are of x86-64")
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("emoji_cdpo", 4),
        ("emoji_lcm_cdpo", 2),
        pytest.param("emoji_flow_cdpo", 4, marks=pytest.mark.long),
    ],
)
def test_the_losses_of_the_small_world(
    alike: ForkServer, name: str, steps: int, tmp_path: Path
) -> None:
    overrides = [f"run_dir={tmp_path}", f"prepare.sampler.steps={steps}", *SHORT]
    for verb in ("prepare", "train"):
        recipe = ROOT / "recipes" / f"{name}.yaml"
        alike.run(WITHOUT_ONEDNN, recipe, overrides, env={"VERB": verb}, seconds=240).succeeded()
    found = losses(tmp_path)
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("CDPO_WRITE_GOLDEN"):
        file.write_text("\n".join([processor(), *map(float.hex, found)]) + "\n")
    made_on, *golden = file.read_text().splitlines()
    if made_on == processor():
        assert list(map(float.hex, found)) == golden
    assert found == pytest.approx([float.fromhex(loss) for loss in golden], rel=1e-3)
