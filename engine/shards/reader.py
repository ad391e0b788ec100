"""Reading samples of shards at random, strictly.

The first time a run opens a shard its size and sha256 are compared with the manifest and its tar
headers are scanned into an index; from then on a sample is one positioned read. What is kept in
memory is bounded by the shards in use, not by the set, but for twelve bytes a pair, by which one
that lies in two shards is noticed.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from operator import add
from pathlib import Path
from threading import Lock

import numpy as np

from ..basics.errors import ShardError, told_by
from .contents import contents_of
from .image_processes import ImageProcesses
from .manifest import Manifest, ShardEntry
from .repeats import PairsMet, ids_of
from .sample import MAX_META_BYTES, META, PairMeta, PairSample, decode_meta
from .store import LocalStore, ShardStore, check_against
from .tar_index import SampleIndex, index_samples, read_span
from .webp import decode_webp

OPENED_AT_ONCE = 8  # shards: hashing leaves Python's lock alone


class _File:
    """A descriptor that is closed when its last user lets go of it, so that no thread ever reads
    from a number that was closed and given out again.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class _OpenShard:
    """A verified shard."""

    name: str
    file: _File
    index: SampleIndex


class ShardReaders:
    """The shards of one manifest, opened on demand; safe to use from several threads.

    ``store`` is where they lie; a folder stands for the :class:`LocalStore` of that folder.
    ``image_workers`` processes decode the images of ``raw`` shards; 0 decodes them in ``read``.
    """

    def __init__(
        self,
        store: ShardStore | str | Path,
        manifest: Manifest,
        *,
        image_workers: int = 0,
    ) -> None:
        self.store = LocalStore(store) if isinstance(store, str | Path) else store
        self._images = (
            ImageProcesses(image_workers) if manifest.kind == "raw" and image_workers else None
        )
        self.contents = contents_of(
            manifest.kind, manifest.latent_shape, manifest.resolution, self._images or decode_webp
        )
        self._members = (META, *self.contents.members)
        # Open files, and shards whose headers stay in memory, about 50 bytes a sample: at least as
        # many as are read in turns, or each read scans a shard again.
        self._max_files, self._max_indexes = 128, 1024
        self.num_opened = 0  # shards so far: whether a wait for them is getting anywhere
        self._files: OrderedDict[str, _OpenShard] = OrderedDict()
        self._indexes: OrderedDict[str, SampleIndex] = OrderedDict()
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._met = PairsMet()
        self._locks: dict[str, Lock] = {}
        self._lock = Lock()

    def keep_indexes(self, num_shards: int) -> None:
        """Expect reads to go round ``num_shards`` shards: keep at least so many indexes."""
        self._max_indexes = max(self._max_indexes, num_shards)

    def keep_files(self, num_shards: int) -> None:
        """Hold ``num_shards`` files open and no more: a cache cannot evict what is open."""
        self._max_files = num_shards

    def check_present(self, entries: Iterable[ShardEntry]) -> None:
        """Raise ShardError for the first shard that is absent or of the wrong size, as far as that
        is cheap enough to run before a model is loaded.
        """
        self.store.check_present(entries)

    def read(self, entry: ShardEntry, index: int) -> PairSample:
        """Sample ``index`` of a shard. Raises ShardError (shard, key, member, reason)."""
        [meta], images = self.read_batch([entry], [index])
        return PairSample(meta, images[:, 0])

    def read_batch(
        self, entries: Sequence[ShardEntry], indices: Sequence[int]
    ) -> tuple[list[PairMeta], np.ndarray]:
        """The records and images (2, n, ...) of n samples, each given by its shard and its place in
        there. Raises as ``read``.
        """
        self._open_together(entries)
        shape = self.contents.shape
        images = np.empty((2, len(entries), *shape[1:]), self.contents.dtype)
        metas = [
            self._read_into(images[:, row], entry, index)
            for row, (entry, index) in enumerate(zip(entries, indices, strict=True))
        ]
        return metas, images

    def _read_into(self, images: np.ndarray, entry: ShardEntry, index: int) -> PairMeta:
        """Fill ``images`` (2, ...) of one sample, and return its record."""
        shard = self._open(entry)
        name, key = shard.name, shard.index.keys[index].decode()
        offsets, sizes = shard.index.offsets[index].tolist(), shard.index.sizes[index].tolist()
        record = self._read_plain(images, shard, offsets, sizes, key)
        if record is None:
            start, end = min(offsets), max(map(add, offsets, sizes))
            span = memoryview(read_span(shard.file.descriptor, name, start, end - start))
            parts = [span[at - start :][:size] for at, size in zip(offsets, sizes, strict=True)]
            record = bytes(parts[0])
            images[:] = self.contents.decode(parts[1:], name, key)
        meta = decode_meta(record, name, key)
        if meta.tier != entry.tier:
            reason = f"is of tier {meta.tier}, the manifest puts this shard in tier {entry.tier}"
            raise ShardError(name, reason, key, META, "mismatch")
        return meta

    def _read_plain(
        self,
        images: np.ndarray,
        shard: _OpenShard,
        offsets: Sequence[int],
        sizes: Sequence[int],
        key: str,
    ) -> bytes | None:
        """Record first, then an array with the header that we write: straight to its place in the
        batch, for copies are most of what reading costs. None for a sample that is not like that.
        """
        header = self.contents.header
        if header is None or sizes[1] != len(header) + images.nbytes or offsets[0] > offsets[1]:
            return None
        before = bytearray(offsets[1] + len(header) - offsets[0])
        try:
            found = os.preadv(shard.file.descriptor, [before, images[0], images[1]], offsets[0])
        except OSError:
            return None  # whoever reads it again says why
        if found != len(before) + images.nbytes or not before.endswith(header):
            return None
        self.contents.check(images, shard.name, key)
        return bytes(before[: sizes[0]])

    def _open_together(self, entries: Sequence[ShardEntry]) -> None:
        """Open shards several at a time: each is read whole for its checksum when it is new, and a
        resumed run starts with many new ones.
        """
        with self._lock:
            wanted = {entry.name: entry for entry in entries if entry.name not in self._files}
        new = list(wanted.values())
        at_once = min(OPENED_AT_ONCE, self._max_files)
        if len(new) > 1:
            with ThreadPoolExecutor(min(len(new), at_once), "open-shards") as pool:
                for _ in pool.map(self._open, new):
                    pass

    def keys(self, entry: ShardEntry) -> list[str]:
        """The keys of a shard's samples in order; opening it verifies its checksum."""
        return [key.decode() for key in self._open(entry).index.keys]

    def close(self) -> None:
        """Let go of all files, and of the processes that decode."""
        if self._images is not None:
            self._images.close()
        with self._lock:
            self._files.clear()
            self._indexes.clear()

    def _open(self, entry: ShardEntry) -> _OpenShard:
        with self._lock:
            shard = self._files.get(entry.name)
            if shard is not None:
                self._files.move_to_end(entry.name)
                return shard
            opening = self._locks.setdefault(entry.name, Lock())
        with opening:  # one thread hashes a new shard while others go on reading from open ones
            with self._lock:
                shard = self._files.get(entry.name)
            if shard is None:
                shard = self._open_checked(entry)
                self._remember(entry.name, shard)
            return shard

    def _remember(self, name: str, shard: _OpenShard) -> None:
        with self._lock:
            self.num_opened += 1
            self._files[name] = shard
            self._indexes[name] = shard.index
            self._indexes.move_to_end(name)
            while len(self._files) > self._max_files:
                self._files.popitem(last=False)
            while len(self._indexes) > self._max_indexes:
                self._indexes.popitem(last=False)

    def _open_checked(self, entry: ShardEntry) -> _OpenShard:
        file = _File(self.store.open(entry))
        try:
            return self._checked(entry, file)
        except ShardError:
            if not self.store.discard(entry):
                raise
        return self._checked(entry, _File(self.store.open(entry)))  # fetched once more

    def _checked(self, entry: ShardEntry, file: _File) -> _OpenShard:
        name = self.store.name_of(entry)
        state = os.fstat(file.descriptor)
        identity = (state.st_ino, state.st_size, state.st_mtime_ns)
        with self._lock:
            index = self._indexes.get(entry.name)
            seen = self._verified.get(entry.name)
        if seen != identity:
            _verify(file, entry, name)
            index = None
        if index is None:
            index = index_samples(file.descriptor, name, self._members, entry.count)
            self._check_sizes(index, name)
        with self._lock:
            if seen is None and (repeats := self._met.add(name, ids_of(index.keys))):
                raise repeats[0]
            self._verified[entry.name] = identity
        return _OpenShard(name, file, index)

    def _check_sizes(self, index: SampleIndex, shard: str) -> None:
        """Refuse members too large for what they are, before anything is read or allocated."""
        for column, member in enumerate(index.members):
            limit = MAX_META_BYTES if member == META else self.contents.max_bytes
            too_large = np.flatnonzero(index.sizes[:, column] > limit)
            if len(too_large):
                size = index.sizes[too_large[0], column]
                key = index.keys[too_large[0]].decode()
                reason = f"{size} bytes, at most {limit} expected"
                raise ShardError(shard, reason, key, member, "too-large")


def _verify(file: _File, entry: ShardEntry, shard: str) -> None:
    size = os.fstat(file.descriptor).st_size
    check_against(entry, shard, size)
    try:
        with open(file.descriptor, "rb", buffering=0, closefd=False) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        reason = f"cannot be read: {told_by(error)}"
        raise ShardError(shard, reason, kind="unreadable") from None
    check_against(entry, shard, size, found)
