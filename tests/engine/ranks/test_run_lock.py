"""One run in a folder, and the same folder for all ranks."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest
from cdpo.engine.basics.errors import OutsideError, RecipeError
from cdpo.engine.ranks import run_lock
from cdpo.engine.ranks.run_lock import RunLock, refuse_other_folder
from refusals import refused


def test_the_second_is_told_who_has_it(tmp_path):
    lock = RunLock(tmp_path)
    with refused(RecipeError, "in-use", "run_dir") as told:
        RunLock(tmp_path)
    assert f"({os.getpid()} on " in str(told.value)
    lock.release()
    RunLock(tmp_path).release()


def test_it_ends_with_the_process(tmp_path):
    take = (
        "import os, pathlib, signal; from cdpo.engine.ranks.run_lock import RunLock; "
        f"lock = RunLock(pathlib.Path({str(tmp_path)!r})); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", take]).returncode == -9
    assert (tmp_path / ".lock").exists()
    RunLock(tmp_path).release()


@pytest.mark.parametrize(
    ("number", "error"),
    [(errno.ENOSPC, OutsideError), (errno.EDQUOT, OutsideError), (errno.EROFS, RecipeError)],
)
def test_a_full_disk_is_no_mistake_in_the_recipe(tmp_path, monkeypatch, number, error):
    def fsync(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    with refused(error, "unwritable", "run_dir"):
        RunLock(tmp_path)


def test_a_file_system_without_locks_is_not_called_another_run(tmp_path, monkeypatch):
    def flock(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with refused(RecipeError, "unsupported", "run_dir", wording="without-locks"):
        RunLock(tmp_path)


def test_ranks_on_another_machine_s_disk_are_refused(tmp_path, monkeypatch):
    """Its parts of the checkpoints would be missing there: better said before hours of work."""
    monkeypatch.setattr(run_lock, "SECONDS_TO_APPEAR", 0.2)
    shared, other = tmp_path / "shared", tmp_path / "other"
    lock = RunLock(shared)
    refuse_other_folder(shared, lock.owner)
    for make in (lambda: None, other.mkdir, lambda: (other / ".lock").write_text("of old")):
        make()
        with refused(RecipeError, "mismatch", "run_dir"):
            refuse_other_folder(other, lock.owner)
    lock.release()
