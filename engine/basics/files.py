"""Files that exist whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import CdpoError, DataError, unwritable


class NewFile(io.RawIOBase):
    """A file open for writing in order, that counts and hashes what passes through.

    Libraries take it where they take a file; it does not seek, and closing it closes nothing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.bytes = 0

    def writable(self) -> bool:
        """It is for nothing else."""
        return True

    def write(self, data: Any) -> int:
        """Append ``data``, whole."""
        view = memoryview(data)
        self._sha256.update(view)
        self.bytes += view.nbytes
        return self._file.write(view)

    @property
    def sha256(self) -> str:
        """Hex digest of everything written so far."""
        return self._sha256.hexdigest()


@contextmanager
def replacing(path: Path | str, error: type[CdpoError] | None = DataError) -> Iterator[NewFile]:
    """A new file for ``path``, which takes the place of the old one when the block ends well.

    It is written under the name ``path.tmp``, in folders made if need be, and both its content and
    its name are on the disk before the block is left. When the block raises, the temporary file
    goes and ``path`` is as it was.

    Raises:
        error: for an OSError, such as a full disk; None lets the OSError through. See
            :func:`.errors.unwritable` of what a RecipeError becomes.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield NewFile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_path(path.parent)
    except BaseException as raised:
        with suppress(OSError):
            temporary.unlink()
        if error is not None and isinstance(raised, OSError):
            raise unwritable(f"cannot write {path}", str(path), raised, error) from raised
        with naming(path):
            raise


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError of the block that names no file, as none does that a write raises, names this."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LFS_REMEDY = "is a pointer of Git LFS, not the file itself: run `git lfs pull` where it comes from"


def lfs_pointer(head: bytes) -> bool:
    """Whether a file that begins so is what Git leaves in place of one that LFS keeps.

    :data:`LFS_REMEDY` says what to do, after the name of the file.
    """
    return head.startswith(LFS_POINTER)


def is_lfs_pointer(path: Path | str) -> bool:
    """The same of a file; False of one that is not there or cannot be read."""
    try:
        with open(path, "rb") as file:
            return lfs_pointer(file.read(len(LFS_POINTER)))
    except (OSError, ValueError):
        return False


def refuse_pointer(path: Path | str) -> None:
    """DataError, kind `unreadable`, for a file that is one of those."""
    if is_lfs_pointer(path):
        raise DataError(f"{path} {LFS_REMEDY}", str(path), "unreadable")


def user_cache() -> Path:
    """The folder for what all runs of a user share and can do without."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cdpo"


def sync_path(path: Path) -> None:
    """Bring a file's content, or the names in a folder, down to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
