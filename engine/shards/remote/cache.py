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
from dataclasses import dataclass
from pathlib import Path

from ...basics.errors import DataError, OutsideError

POLL_SECONDS = 0.02

_READY, _PART, _LOCK = ".tar", ".part", "lock"
_OURS = re.compile(r"[0-9a-f]{64}\.(tar|part)")


@dataclass(frozen=True, slots=True)
class _Cached:
    path: Path
    size: int
    used: int
    """When, in nanoseconds."""


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
                    part = self._claim(key, size, force)
                    descriptor = None if part is None else self._filled(key, part, fill)
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
        path = self.folder / (key + _READY)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        # Only an eviction holds it exclusively, and that takes no time.
        if _lock(descriptor, fcntl.LOCK_SH) and os.fstat(descriptor).st_nlink:
            with suppress(OSError):  # another user's file cannot be touched
                _touch(descriptor)
            return descriptor
        os.close(descriptor)
        return None

    def _claim(self, key: str, size: int, force: bool) -> int | None:
        """The part of a file, ours to fill; None if it is another's or ready by now."""
        path = self.folder / (key + _PART)
        with self._exclusive():
            if (self.folder / (key + _READY)).exists():
                return None
            files = self._files()
            if path.exists():  # still, so somebody holds it
                return None
            excess = sum(file.size for file in files) + size - self.max_bytes
            self._make_room(files, excess, force)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._allocate(descriptor, size)
            except BaseException:
                path.unlink()
                os.close(descriptor)
                raise
            return descriptor

    def _filled(self, key: str, part: int, fill: Callable[[int], None]) -> int:
        path = self.folder / (key + _PART)
        try:
            fill(part)
            _touch(part)
            with self._exclusive():
                os.rename(path, path.with_suffix(_READY))
                fcntl.flock(part, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BaseException:
            with suppress(OSError):
                path.unlink()
            os.close(part)
            raise
        return part

    # All files

    def _files(self) -> list[_Cached]:
        """All that takes room, oldest use first, after parts that nobody fills are removed."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                if _OURS.fullmatch(entry.name) is None:
                    continue  # the folder may be any
                if path.suffix == _PART and _remove_unlocked(path):
                    continue
                with suppress(FileNotFoundError):
                    state = entry.stat(follow_symlinks=False)
                    found.append(_Cached(path, state.st_size, state.st_atime_ns))
        return sorted(found, key=lambda file: file.used)

    def _make_room(self, files: list[_Cached], excess: int, force: bool) -> None:
        """Evict ready files, the least recently used first, until ``excess`` bytes are gone."""
        in_use = []
        for file in files:
            if excess <= 0:
                return
            if file.path.suffix == _PART:
                continue
            if _remove_unlocked(file.path):
                excess -= file.size
            else:
                in_use.append(file)
        if excess > 0 and not force:
            raise CacheFull
        for file in in_use:
            if excess <= 0:
                return
            file.path.unlink(missing_ok=True)
            excess -= file.size

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
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._evict_one():
                    raise

    def _evict_one(self) -> bool:
        ready = (file for file in self._files() if file.path.suffix == _READY)
        return any(_remove_unlocked(file.path) for file in ready)

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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = f"data.cache_gib={self.max_bytes / 2**30:.3g} is more than the disk can give"
        return DataError(f"shard cache {self.folder}: {error.strerror or error}; {remedy}")


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise OutsideError(f"{what}, for longer than data.fetch.budget allows")
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
