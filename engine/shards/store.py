"""Where shards lie: a reader asks a store for an open file and does not care how it got there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from ..basics.errors import ShardError, told_by
from ..basics.files import LFS_REMEDY, is_lfs_pointer
from .manifest import FileEntry, Manifest, load_manifest


class ShardStore(Protocol):
    """A set of shards at one place. Its methods may be called from several threads at once."""

    @property
    def location(self) -> str:
        """The place as messages name it, without credentials."""

    def manifest(self) -> Manifest:
        """The table of contents; DataError in one line where it is absent or wrong."""

    def name_of(self, entry: FileEntry) -> str:
        """A shard as messages name it, without credentials."""

    def open(self, entry: FileEntry) -> int:
        """A descriptor for reading, the caller's to close. While it is open the file stays.

        Raises ShardError where the shard is missing, OutsideError where a service is at fault.
        """

    def discard(self, entry: FileEntry) -> bool:
        """Give up a copy that proved bad; whether opening it again may bring a good one."""

    def check_present(self, entries: Iterable[FileEntry]) -> None:
        """Raise ShardError for the first shard that is absent or of the wrong size, as far as that
        is cheap: it runs before a model is loaded.
        """


class LocalStore:
    """Shards in a folder of this machine, which are read where they are.

    ``manifest_sha256`` is what their manifest must have, if that is known.
    """

    def __init__(self, folder: str | Path, manifest_sha256: str | None = None) -> None:
        self.folder = Path(folder)
        self._manifest_sha256 = manifest_sha256

    @property
    def location(self) -> str:
        return str(self.folder)

    def manifest(self) -> Manifest:
        return load_manifest(self.folder, self._manifest_sha256)

    def name_of(self, entry: FileEntry) -> str:
        return str(self.folder / entry.name)

    def open(self, entry: FileEntry) -> int:
        try:
            return os.open(self.folder / entry.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._cannot_open(entry, error) from None

    def discard(self, entry: FileEntry) -> bool:
        return False  # it is the user's own, and there is no other

    def check_present(self, entries: Iterable[FileEntry]) -> None:
        for entry in entries:
            try:
                size = (self.folder / entry.name).stat().st_size
            except OSError as error:
                raise self._cannot_open(entry, error) from None
            check_against(entry, self.name_of(entry), size)

    def _cannot_open(self, entry: FileEntry, error: OSError) -> ShardError:
        if isinstance(error, FileNotFoundError):
            reason = "missing; copy it here or run prepare again"
            return ShardError(self.name_of(entry), reason, kind="missing")
        reason = f"cannot be opened: {told_by(error)}"
        return ShardError(self.name_of(entry), reason, kind="unreadable")


def check_against(
    entry: FileEntry,
    shard: str,
    size: int,
    sha256: str | None = None,
    remedy: str = "; copy or prepare it again",
) -> None:
    """Raise ShardError unless a file of ``size`` bytes, whose ``sha256`` may not be known yet, is
    as the manifest says.
    """
    if size != entry.bytes and is_lfs_pointer(shard):
        raise ShardError(shard, LFS_REMEDY, kind="unreadable")
    if size != entry.bytes:
        what, kind = ("truncated",) * 2 if size < entry.bytes else ("too long", "mismatch")
        reason = f"{what}: {size} bytes, manifest says {entry.bytes}"
        raise ShardError(shard, reason + remedy, kind=kind)
    if sha256 not in (None, entry.sha256):
        reason = f"sha256 {sha256[:12]}… is not the manifest's {entry.sha256[:12]}…: damaged"
        raise ShardError(shard, reason + remedy, kind="damaged")
