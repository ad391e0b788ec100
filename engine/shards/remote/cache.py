"""A folder of downloaded files, bounded in bytes and shared by all processes of a machine.

A file is named by its sha256, so sets that share shards share copies, and a name means a content.
All agreement is by advisory locks (flock), which end with the process that holds them:

- who fills `<sha256>.part` holds it exclusively; a part that nobody holds was left by a process
  that was killed, and goes;
- who reads `<sha256>.tar` holds it shared, so files in use are the last to be evicted;
- claiming, renaming and evicting happen under the lock of the folder.

A part has its full length from the start: the bound counts it, and a full disk is met at once.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ...basics.errors import DISK_FULL, DataError, OutsideError, told_by

POLL_SECONDS = 0.02

_READY, _PART, _LOCK = ".tar", ".part", "lock"
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")


class CacheFull(Exception):
    """No room without evicting what is being read."""


class ShardCache:
    """See the module. ``patience`` bounds in seconds every wait for another process."""

    def __init__(self, folder: str | Path, max_bytes: int, patience: float) -> None:
        """Raises DataError for a folder that cannot be written."""
        self.folder, self.max_bytes, self._patience = Path(folder), max_bytes, patience
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._exclusive():
                self._files()  # what a killed process left goes at once
        except OSError as error:
            raise self._failed(error) from None

    def holds(self, key: str) -> bool:
        """Whether a file is here; it counts as used, so that others are evicted before it."""
        try:
            _touch(self.folder / (key + _READY))
        except OSError:
            return False
        return True

    def get(self, key: str, size: int, fill: Callable[[int], None], *, force: bool = True) -> int:
        """A descriptor of the file ``key`` for reading, filled by ``fill(descriptor)`` if absent.

        The file is not evicted while the descriptor is open, unless all that are cached are in use:
        then the one opened longest ago loses its name, and its bytes when its readers let go; with
        ``force`` off CacheFull is raised instead. Raises DataError for a disk that is full or
        fails, OutsideError when another process does not finish, and what ``fill`` raises.
        """
        deadline = time.monotonic() + self._patience
        try:
            while True:
                descriptor = self._open_ready(key)
                if descriptor is None:
                    descriptor = self._filled(key, size, fill, force)
                if descriptor is not None:
                    return descriptor
                _wait(deadline, f"{self.folder / key[:12]}… is being fetched by another process")
        except OSError as error:
            raise self._failed(error) from None

    def discard(self, key: str) -> None:
        """Forget a copy that proved bad; who reads it keeps it."""
        with self._exclusive(), suppress(OSError):
            (self.folder / (key + _READY)).unlink()

    # One file

    def _open_ready(self, key: str) -> int | None:
        try:
            descriptor = os.open(self.folder / (key + _READY), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        # Only an eviction holds it exclusively, and that takes no time.
        if _lock(descriptor, fcntl.LOCK_SH) and os.fstat(descriptor).st_nlink:
            with suppress(OSError):  # another user's file cannot be touched
                _touch(descriptor)
            return descriptor
        os.close(descriptor)
        return None

    def _filled(self, key: str, size: int, fill: Callable[[int], None], force: bool) -> int | None:
        """The file, made here; None if that is another's to do, or it is ready by now."""
        ready, path = (self.folder / (key + suffix) for suffix in (_READY, _PART))
        with self._exclusive():
            files = self._files()
            if ready.exists() or path.exists():  # a part that is there still is held by somebody
                return None
            excess = sum(taken for _, taken, _ in files) + size - self.max_bytes
            self._make_room(files, excess, force)
            part = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            with _or_removed(path, part):
                _lock(part, fcntl.LOCK_EX)
                self._allocate(part, size)
        with _or_removed(path, part):
            fill(part)
            _touch(part)
            with self._exclusive():
                os.rename(path, ready)
                _lock(part, fcntl.LOCK_SH)
        return part

    # All files

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of use, bytes, path) of all that takes room, oldest use first, after parts that
        nobody fills are removed.
        """
        found = []
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) is None:
                continue  # the folder may be any
            if path.suffix == _PART and _remove_unlocked(path):
                continue
            with suppress(FileNotFoundError):
                state = path.lstat()
                found.append((state.st_atime_ns, state.st_size, path))
        return sorted(found)

    def _make_room(self, files: list[tuple[int, int, Path]], excess: int, force: bool) -> None:
        """Evict ready files, the least recently used first, until ``excess`` bytes are gone: those
        that nobody reads, and only then, by ``force``, others.
        """
        ready = [(size, path) for _, size, path in files if path.suffix == _READY]
        for size, path in list(ready):
            if excess > 0 and _remove_unlocked(path):
                excess -= size
                ready.remove((size, path))
        if excess > 0 and not force:
            raise CacheFull
        for size, path in ready:
            if excess > 0:
                path.unlink(missing_ok=True)
                excess -= size

    def _allocate(self, descriptor: int, size: int) -> None:
        """Take ``size`` bytes of the disk, from cached files if there is no other way."""
        while True:
            try:
                os.posix_fallocate(descriptor, 0, size)
                return
            except OSError as error:
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    os.ftruncate(descriptor, size)  # a file system without allocation
                    return
                unread = (path for _, _, path in self._files() if path.suffix == _READY)
                if error.errno not in DISK_FULL or not any(map(_remove_unlocked, unread)):
                    raise

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """The lock of the folder, held for moments only."""
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            deadline = time.monotonic() + self._patience
            while not _lock(descriptor, fcntl.LOCK_EX):
                _wait(deadline, f"the cache {self.folder} is held by another process")
            yield
        finally:
            os.close(descriptor)

    def _failed(self, error: OSError) -> DataError:
        remedy = "give data.cache another folder, on a local disk"
        if error.errno in DISK_FULL:
            remedy = f"data.cache_gib={self.max_bytes / 2**30:.3g} is more than the disk can give"
        what = f"shard cache {self.folder}: {told_by(error)}; {remedy}"
        kind = "no-space" if error.errno in DISK_FULL else "unwritable"
        return DataError(what, str(self.folder), kind)


@contextmanager
def _or_removed(path: Path, descriptor: int) -> Iterator[None]:
    """Remove and close a file that the block fails to make."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        raise


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        limit = "data.fetch.budget"
        raise OutsideError(f"{what}, for longer than {limit} allows", limit, "timeout")
    time.sleep(POLL_SECONDS)


def _lock(descriptor: int, kind: int) -> bool:
    """Take a lock if it is free; OSError on file systems without locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unlocked(path: Path) -> bool:
    """Remove a file that no process holds; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not _lock(descriptor, fcntl.LOCK_EX):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _touch(file: Path | int) -> None:
    """Note the time of use where eviction looks for it, in the time of access; the time of change
    tells the readers whether a file is the one they have verified.
    """
    os.utime(file, ns=(time.time_ns(), os.stat(file).st_mtime_ns))
