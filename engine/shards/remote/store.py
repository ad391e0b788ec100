"""Shards behind a URL: brought into the cache when they are read, or before, and checked there."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Lock

from ...basics.errors import RecipeError, ShardError
from ...basics.failpoints import failpoint
from ...basics.files import LFS_POINTER, LFS_REMEDY, lfs_pointer, user_cache
from ...recipe import Data
from ..manifest import FILE_NAME, MAX_BYTES, FileEntry, Manifest, parse_manifest
from ..store import LocalStore, ShardStore, check_against
from .cache import CacheFull, ShardCache
from .fetch import Arrival, RemoteFolder, bring_text, is_remote

ARRIVALS = 2  # a shard that arrives damaged is fetched once more


def open_store(location: str, data: Data, processes: int = 1) -> ShardStore:
    """The shards at a folder or URL; ``processes`` of this machine are to read them.

    Raises RecipeError for a URL that is not taken, OutsideError for a missing package and DataError
    for a cache folder that cannot be written.
    """
    if is_remote(location):
        return RemoteStore(location, data, processes)
    return LocalStore(location.removeprefix("file://"), data.manifest_sha256)


def default_cache() -> Path:
    """Where shards are kept when a recipe does not say."""
    return user_cache() / "shards"


class RemoteStore:
    """See :class:`~.store.ShardStore`."""

    def __init__(self, url: str, data: Data, processes: int = 1) -> None:
        self.spec, self.processes = data.fetch, processes
        self._folder = RemoteFolder(url, data.fetch)
        self._manifest_sha256 = data.manifest_sha256
        folder = Path(data.cache).expanduser() if data.cache else default_cache()
        self.cache = ShardCache(folder, int(data.cache_gib * 2**30), data.fetch.budget)
        self._flights: dict[str, Future[None]] = {}
        self._lock = Lock()

    @property
    def location(self) -> str:
        return self._folder.url

    def manifest(self) -> Manifest:
        text = bring_text(self._folder, FILE_NAME, MAX_BYTES)
        return parse_manifest(text, self._folder.name_of(FILE_NAME), self._manifest_sha256)

    def name_of(self, entry: FileEntry) -> str:
        return self._folder.name_of(entry.name)

    def open(self, entry: FileEntry) -> int:
        return self._get(entry, force=True)

    def fetch_ahead(self, entry: FileEntry) -> None:
        """Bring a shard into the cache; CacheFull if that takes evicting what is being read."""
        os.close(self._get(entry, force=False))

    def discard(self, entry: FileEntry) -> bool:
        self.cache.discard(entry.sha256)
        return True

    def check_present(self, entries: Iterable[FileEntry]) -> None:
        """Nothing: one question a shard would cost minutes. They are fetched ahead and checked."""

    def check_room(self, entries: Sequence[FileEntry], num_shards: int) -> int:
        """Bytes of the cache that are left for fetching ahead when each process reads
        ``num_shards`` of these shards in turns; RecipeError if it cannot even hold those.
        """
        largest = max((entry.bytes for entry in entries), default=0)
        in_turns = min(num_shards, len(entries)) * largest
        share = self.cache.max_bytes // self.processes
        if share < in_turns:
            raise RecipeError(
                f"data.cache_gib={self.cache.max_bytes / 2**30:.3g} cannot hold the shards that "
                f"{self.processes} processes of this machine read in turns: give it "
                f"{self.processes * in_turns / 2**30:.3g} or more (twice that to fetch ahead), or "
                "lower data.shuffle_shards",
                "data.cache_gib",
                "out-of-range",
            )
        return share - in_turns

    def close(self) -> None:
        """End what is on its way."""
        self._folder.stop()

    def _get(self, entry: FileEntry, *, force: bool) -> int:
        """One thread brings a shard; others that want it share what comes of it."""
        own: Future[None] = Future()
        with self._lock:
            flight = self._flights.setdefault(entry.sha256, own)
        if flight is not own:
            with suppress(CacheFull):
                flight.result()  # bounded, as every fetch is
        try:
            bring = partial(self._bring, entry)
            return self.cache.get(entry.sha256, entry.bytes, bring, force=force)
        except BaseException as error:
            own.set_exception(error)
            raise
        finally:
            if flight is own:
                with self._lock:
                    del self._flights[entry.sha256]
            if not own.done():
                own.set_result(None)

    def _bring(self, entry: FileEntry, descriptor: int) -> None:
        """Write the shard to ``descriptor`` and check it; a damaged one is fetched once more."""
        name = self.name_of(entry)
        remedy = f", each of the {ARRIVALS} times it arrived; copy it there again"
        deadline = time.monotonic() + self.spec.budget  # of all arrivals: others wait for them
        with open(descriptor, "wb", buffering=0, closefd=False) as file:
            for chances in reversed(range(ARRIVALS)):
                arrival = _Shard(file, entry.bytes, resumes=True)
                try:
                    self._folder.bring(entry.name, arrival, deadline)
                except FileNotFoundError:
                    reason = "missing; copy it there again"
                    raise ShardError(name, reason, kind="missing") from None
                file.seek(0)  # whoever is given the descriptor reads from the start
                if lfs_pointer(os.pread(descriptor, len(LFS_POINTER), 0)):
                    raise ShardError(name, LFS_REMEDY, kind="unreadable")
                try:
                    check_against(entry, name, arrival.arrived, arrival.sha256, remedy)
                    return
                except ShardError:
                    if not chances:
                        raise


class _Shard(Arrival):
    def write(self, data: bytes) -> None:
        failpoint("cache.fill")
        super().write(data)
