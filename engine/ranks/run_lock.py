"""One run in a folder: the lock on it, and whether all ranks mean the same folder."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import uuid
from pathlib import Path

from ..basics.errors import RecipeError, told_by, unwritable

LOCK = ".lock"
TAKEN = (errno.EWOULDBLOCK, errno.EACCES)
SECONDS_TO_APPEAR = 10.0  # of a file that another machine has written


class RunLock:
    """An exclusive lock that ends with the process. Over NFS it holds between machines as well.

    RecipeError if another run has it, or if the folder cannot be written or its file system locks
    nothing; OutsideError if its disk is full.
    """

    def __init__(self, folder: Path, key: str = "run_dir") -> None:
        """``key`` is the recipe's for the folder; that of shards, `data.path`, has its lock beside
        it, since it is copied as it is.
        """
        path = lock_of(folder, key)
        message = f"{key} {folder} cannot be written"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+")  # noqa: SIM115 (held, not scoped)
        except OSError as error:
            raise unwritable(message, key, error, RecipeError) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            if error.errno in TAKEN:
                raise RecipeError(
                    f"{key} {folder} is in use by another process{_holder(path)}: wait for it, "
                    "or give another",
                    key,
                    "in-use",
                ) from None
            raise RecipeError(
                f"{key} {folder} cannot be locked ({told_by(error)}), and two runs in it would "
                "destroy each other: mount its file system with locks, or give a folder elsewhere",
                key,
                "unsupported",
            ) from None
        self.owner = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}"
        try:
            self._file.truncate(0)
            self._file.write(self.owner)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(message, key, error, RecipeError) from None

    def release(self) -> None:
        """Let the next run in."""
        self._file.close()


def lock_of(folder: Path, key: str) -> Path:
    """The file that is locked."""
    if key == "run_dir":
        return folder / LOCK
    real = folder.resolve()
    return real.with_name(f".{real.name}{LOCK}")


def _holder(path: Path) -> str:
    """Who holds a lock, as it says itself."""
    try:
        host, pid, _ = path.read_text()[:256].split()
    except (OSError, ValueError):
        return ""
    return f" ({pid} on {host})"


def refuse_other_folder(folder: Path, owner: str, key: str = "run_dir") -> None:
    """RecipeError if the folder of this rank is not the one that ``owner`` has locked: a run keeps
    the parts of all ranks in one folder.
    """
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while True:
        try:
            if lock_of(folder, key).read_text() == owner:
                return
        except (OSError, ValueError):
            pass
        if time.monotonic() > deadline:
            raise RecipeError(
                f"{key} {folder} on {socket.gethostname()} is another folder than on "
                f"{owner.split()[0]}, where rank 0 runs: give one on a file system that all "
                "machines share",
                key,
                "mismatch",
            )
        time.sleep(0.1)
