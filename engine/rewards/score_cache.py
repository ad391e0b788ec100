"""Scores by image and prompt, so that nothing is scored twice: in memory, and in a folder if asked.

A file of the folder belongs to one process, which appends to it: 32 bytes of key, a float32 and the
CRC-32 of both, little endian. What a kill left half written, or a disk damaged, is passed over.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
import zlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from PIL import Image

from ..basics.errors import DataError

KEPT = 1 << 20  # scores in memory, some 200 bytes each; an imported data set may have more
RECORD = struct.Struct("<32sfI")


def score_key(image: Image.Image, prompt: str) -> bytes:
    """SHA-256 of an image's mode, size and pixels and of the prompt."""
    digest = hashlib.sha256(f"{image.mode} {image.size} {len(prompt)} {prompt} ".encode())
    digest.update(image.tobytes())
    return digest.digest()


class ScoreCache:
    """Scores of one reward; ``folder`` is of that reward alone."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._file: Path | None = None
        paths = sorted(folder.glob("*.scores")) if folder else ()
        kept = (record for path in paths for record in _records(path))
        # Half of what there is room for: the first new score must not drive them out again.
        self._scores: dict[bytes, float] = dict(islice(kept, KEPT // 2))

    def __contains__(self, key: bytes) -> bool:
        return key in self._scores

    def __getitem__(self, key: bytes) -> float:
        return self._scores[key]

    def add(self, scores: Mapping[bytes, float]) -> None:
        """Remember some scores; DataError where the folder cannot be written."""
        if len(self._scores) + len(scores) > KEPT:
            self._scores.clear()
        self._scores |= scores
        if self.folder is None or not scores:
            return
        if self._file is None:
            self._file = self.folder / f"{uuid.uuid4().hex}.scores"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as file:
                file.write(b"".join(_record(*item) for item in scores.items()))
        except OSError as error:
            raise DataError(f"cannot write {self._file}: {os.strerror(error.errno or 0)}") from None


def _record(key: bytes, score: float) -> bytes:
    return RECORD.pack(key, score, zlib.crc32(RECORD.pack(key, score, 0)[:-4]))


def _records(path: Path) -> Iterator[tuple[bytes, float]]:
    data = path.read_bytes()
    for key, score, check in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]):
        if zlib.crc32(RECORD.pack(key, score, 0)[:-4]) == check:
            yield key, score
