"""Files of a frozen-pass cache: written once, whole or not at all, and checked before they count.

A file holds, for N draws of pairs, their ids and numbers, the reference's errors and, where a
teacher led, the targets. A hash over all but the targets stands in its head, and a checksum of each
target beside its id: targets are large, and read one by one when they are used.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ...basics.errors import told_by
from ...basics.failpoints import failpoint
from ...basics.files import replacing

FORMAT = 1
SMALL = ("pair_ids", "draws", "errors", "target_of", "sums")
RECORD_BYTES = 8 + 4 + 2 * 4 + 4 + 4
SUFFIX = ".safetensors"


class Damaged(Exception):
    """A file, or a target in it, that is not as it was written."""


@dataclass(frozen=True)
class Rows:
    """N draws of pairs."""

    pair_ids: np.ndarray
    """(N,) int64."""
    draws: np.ndarray
    """(N,) int32: which of its draws."""
    errors: np.ndarray
    """(N, 2) float32, the winner's first."""
    target_of: np.ndarray
    """(N,) int32: the row of the file's targets; -1 where no teacher led."""


def write_segment(folder: Path, key: str, rows: Rows, targets: np.ndarray | None) -> Path:
    """A new file with ``targets`` (T, 2, C, h, w) float16. DataError, naming it, if the disk is
    full or the folder read-only.
    """
    failpoint("frozen.write")
    sums = np.zeros(len(rows.pair_ids), np.uint32)
    led = np.flatnonzero(rows.target_of >= 0)
    if targets is not None:
        sums[led] = [zlib.crc32(targets[row].tobytes()) for row in rows.target_of[led]]
    tensors = {**vars(rows), "sums": sums}
    metadata = {"format": str(FORMAT), "key": key, "sha256": _hash(tensors)}
    whole = tensors if targets is None else tensors | {"targets": targets}
    # Older files sort first: of two that hold a draw the first counts, for every run that reads.
    path = folder / f"{time.time_ns():020d}-{uuid4().hex[:8]}{SUFFIX}"
    with replacing(path) as file:
        file.write(save(whole, metadata=metadata))
    return path


class Segment:
    """A file that has been read, but for its targets. Raises Damaged."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in SMALL}
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{path}: {told_by(error)}") from None
        if (metadata.get("format"), metadata.get("key")) != (str(FORMAT), key):
            raise Damaged(f"{path}: it is of another version, or of another run")
        if metadata.get("sha256") != _hash(tensors):
            raise Damaged(f"{path}: its content is not what was written")
        self._sums = tensors.pop("sums")
        self.rows = Rows(**tensors)

    def target(self, row: int) -> np.ndarray:
        """(2, C, h, w) float16 of a draw."""
        try:
            found = _opened(self.path).get_slice("targets")[int(self.rows.target_of[row])]
        except (OSError, SafetensorError) as error:
            raise Damaged(f"{self.path}: {told_by(error)}") from None
        if zlib.crc32(found.tobytes()) != self._sums[row]:
            raise Damaged(f"{self.path}: a target in it is not what was written")
        return np.asarray(found)


@lru_cache(maxsize=64)
def _opened(path: Path) -> Any:
    return safe_open(path, framework="np")


def _hash(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in SMALL:
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
