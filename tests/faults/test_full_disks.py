"""A disk that is really full: a small one in memory, where this system lets us mount one.

Where it does not, the fail-points of tests/engine/test_resume.py play it.
"""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import losses
from prepared import contents

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Take all but ``leave`` bytes; returns the file to remove."""
    state = os.statvfs(disk)
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - leave)
    return ballast


def test_in_a_checkpoint(faults, disk):
    """The one before stays, and with room again the run goes on from it."""
    run = faults.up_to_step_4(disk / "run")
    ballast = fill(disk, leave=64 * 1024)
    faults.train(run).refused(5, "step-00000006")
    names = {path.name for path in run.glob("checkpoints/step-*")}
    assert names == {"step-00000002", "step-00000004"}
    ballast.unlink()
    faults.train(run).succeeded()
    assert losses(run) == faults.uninterrupted


def test_in_prepare(faults, disk):
    """No manifest is there until the set is whole; with room again it is the same set."""
    run = disk / "run"
    ballast = fill(disk, leave=256 * 1024)
    faults.prepare(run).refused(3, str(run))
    assert not (run / "shards" / "manifest.json").exists()
    ballast.unlink()
    faults.prepare(run).succeeded()
    assert contents(run / "shards") == contents(faults.world.shards)


def test_in_prepare_for_one_rank_alone(faults, tmp_path):
    """The other is told, and does not go on with its share for hours to wait in vain."""
    outcome = faults.prepare(tmp_path / "run", failpoint="shard.write@2:enospc/rank1")
    assert outcome.codes == [3, 3], outcome.text
    assert "No space left on device" in outcome.output[1] and "Traceback" not in outcome.text
