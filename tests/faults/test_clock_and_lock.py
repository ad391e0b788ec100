"""The clock jumps; a second run starts in the same folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from launching import ROOT, losses
from shard_server import serving

pytestmark = pytest.mark.slow
JUMP_CLOCK = ROOT / "tests" / "workers" / "jump_clock.py"
YEAR = 365 * 24 * 3600


@pytest.mark.parametrize("jump", [YEAR, -YEAR], ids=["forward", "back"])
def test_the_clock_jumps(faults, tmp_path: Path, jump: int) -> None:
    """In the middle of a run, otherwise on each rank; and before the resume all files are dated
    anew, the older checkpoint as the newer one. Waits are measured by a clock that does not jump,
    and what is newest goes by step.
    """
    run = tmp_path / "run"
    with serving(faults.world.shards, chunk=512) as web:
        mine = (f"data.path={web.url}", f"data.cache={tmp_path / 'cache'}")
        env = {"JUMP": str(jump)}
        faults.train(run, *mine, "train.steps=4", script=JUMP_CLOCK, env=env).succeeded()
        paths = sorted(path for path in run.rglob("*") if not path.is_symlink())
        for age, path in enumerate(paths):
            os.utime(path, (10**9 - age, 10**9 - age))
        faults.train(run, *mine).succeeded()
    assert losses(run) == faults.uninterrupted


def test_two_runs_in_one_folder(faults, refused, tmp_path: Path) -> None:
    """The second is refused, on all its ranks; the first is not disturbed."""
    run = tmp_path / "run"
    run.mkdir()
    with open(run / ".lock", "w") as lock:  # what a run holds as long as it lives
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(faults.train(run), 2, str(run), "in use by another process")
        refused(faults.prepare(run), 2, str(run), "in use by another process")
    assert [path.name for path in run.iterdir()] == [".lock"]
