"""Whether a set of shards is sound: every shard, every sample, and all that is wrong with them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from ...basics.errors import DataError, ShardError
from ...shards.manifest import Manifest, ShardEntry
from ...shards.prompts import PromptFiles
from ...shards.reader import ShardReaders
from ...shards.repeats import PairsMet
from ...shards.store import LocalStore

PROBLEMS_PER_SHARD = 20
PROBLEMS_IN_ALL = 200
WORKERS = 4


@dataclass
class CheckReport:
    """What checking a set came to."""

    manifest: Manifest
    num_pairs: int = 0
    """Samples that were read and are as they should be."""
    num_problems: int = 0
    problems: list[str] = field(default_factory=list)
    """One line each, in the order of the manifest; at most PROBLEMS_IN_ALL of them."""
    strays: list[str] = field(default_factory=list)
    """Names in the folder that look like shards and are in no manifest: nothing reads them."""

    @property
    def is_sound(self) -> bool:
        return self.num_problems == 0

    def add(self, problem: str) -> None:
        """Count a problem, and keep it while there is room."""
        self.num_problems += 1
        if len(self.problems) < PROBLEMS_IN_ALL:
            self.problems.append(problem)


@dataclass(frozen=True)
class _ShardReport:
    pair_ids: np.ndarray
    problems: list[str]
    num_problems: int


def check_set(
    folder: str | Path,
    manifest: Manifest,
    *,
    workers: int = WORKERS,
    on_shard: Callable[[int], None] | None = None,
) -> CheckReport:
    """Read every sample of the set in ``folder`` as training would, and hold it to its manifest;
    of stored prompts the first file that is wrong is told.

    A shard whose checksum is wrong is read all the same, to find which of its samples are damaged.
    ``on_shard`` is told the pairs of each shard when it is done. Memory: twelve bytes a pair, for
    pairs that lie in two shards.
    """
    folder = Path(folder)
    report = CheckReport(manifest, strays=_strays(folder, manifest))
    met = PairsMet()
    for entry, shard in _shard_reports(folder, manifest, workers):
        for problem in shard.problems:
            report.add(problem)
        report.num_problems += shard.num_problems - len(shard.problems)
        report.num_pairs += len(shard.pair_ids)
        for error in met.add(str(folder / entry.name), shard.pair_ids):
            report.add(str(error))
        if on_shard is not None:
            on_shard(entry.count)
    if manifest.text is not None:
        try:
            PromptFiles(LocalStore(folder), manifest.text)
        except DataError as error:
            report.add(str(error))
    return report


def _shard_reports(
    folder: Path, manifest: Manifest, workers: int
) -> Iterator[tuple[ShardEntry, _ShardReport]]:
    """Shards in the order of the manifest, a few of them at a time."""
    with ThreadPoolExecutor(workers, "check-shards") as pool:
        waiting = iter(manifest.shards)
        running = [
            (entry, pool.submit(_check_shard, folder, manifest, entry))
            for entry in islice(waiting, 2 * workers)
        ]
        while running:
            entry, future = running.pop(0)
            yield entry, future.result()
            for following in islice(waiting, 1):
                running.append((following, pool.submit(_check_shard, folder, manifest, following)))


def _check_shard(folder: Path, manifest: Manifest, entry: ShardEntry) -> _ShardReport:
    problems: list[str] = []
    readers = ShardReaders(folder, manifest)
    try:
        keys = readers.keys(entry)
    except ShardError as error:
        problems.append(str(error))
        found = _as_found(folder, entry)
        if found is None:
            return _ShardReport(np.empty(0, dtype=np.int64), problems, 1)
        readers, entry = ShardReaders(folder, manifest), found
        try:
            keys = readers.keys(entry)
        except ShardError as inner:  # the headers are damaged as well: there is nothing to go by
            return _ShardReport(np.empty(0, dtype=np.int64), [*problems, str(inner)], 2)
    pair_ids, num_problems = [], len(problems)
    for index in range(len(keys)):
        try:
            pair_ids.append(readers.read(entry, index).pair_id)
        except ShardError as error:
            num_problems += 1
            if num_problems <= PROBLEMS_PER_SHARD:
                problems.append(str(error))
    readers.close()
    return _ShardReport(np.array(pair_ids, dtype=np.int64), problems, num_problems)


def _as_found(folder: Path, entry: ShardEntry) -> ShardEntry | None:
    """The entry with the size and the checksum that its file has; None where they are not what is
    wrong with it, or it cannot be read.
    """
    try:
        descriptor = LocalStore(folder).open(entry)
    except ShardError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None
    if (size, sha256) == (entry.bytes, entry.sha256):
        return None
    return entry.model_copy(update={"bytes": size, "sha256": sha256})


def _strays(folder: Path, manifest: Manifest) -> list[str]:
    ours = {entry.name for entry in manifest.shards}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name.endswith((".tar", ".tar.tmp")) and path.name not in ours
    )
