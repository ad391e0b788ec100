"""Calling a reward: in batches, once an image, with its failures confined and its scores kept.

Out of memory: the batch is halved, for good, and that is said. Raised over a batch: its images are
scored one by one, and those that fail alone get NaN, which stage 1 drops and counts. They are
named, and so are images with a score of NaN or infinity. Nothing but failures from the start, a
device that has failed, or an answer of another shape or type: an error.

Scores are kept by image and prompt: in memory, and in a folder if asked. A file of the folder
belongs to one process, which appends to it: 32 bytes of key, a float32 and the CRC-32 of both,
little endian. What a kill left half written, or a disk damaged, is passed over.
"""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..basics.errors import CdpoError, DataError, OutsideError, told_by
from ..basics.memory import is_out_of_memory
from ..display.terminal import Terminal
from .identity import identity_of
from .protocol import Identity, Scorer

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
            message = f"cannot write {self._file}: {told_by(error)}"
            raise DataError(message, str(self._file), "unwritable") from None


def _record(key: bytes, score: float) -> bytes:
    return RECORD.pack(key, score, zlib.crc32(RECORD.pack(key, score, 0)[:-4]))


def _records(path: Path) -> Iterator[tuple[bytes, float]]:
    data = path.read_bytes()
    for key, score, check in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]):
        if zlib.crc32(RECORD.pack(key, score, 0)[:-4]) == check:
            yield key, score


HOPELESS = 64  # images that fail in a row, from the first one on, before a run is given up
NAMED = 8  # images that are named as failed; the rest are counted


class Asked(NamedTuple):
    """An image to score, and what messages call it."""

    image: Image.Image
    prompt: str
    name: str


class ScoredCall:
    """The reward of one scorer. ``cache`` is a folder that keeps scores beyond this process.

    ``precision`` is that of its networks; None of a scorer without any, such as a function of the
    user's, which may mean what it says by NaN.
    """

    def __init__(
        self,
        scorer: Scorer,
        label: str,
        batch_size: int,
        settings: str = "",
        cache: Path | None = None,
        *,
        precision: str | None = None,
        identity: Identity | None = None,
    ) -> None:
        """``identity`` is of the scorer with its settings; left out, it is worked out."""
        self.scorer = scorer
        self.precision = precision
        self.label = label
        self.batch_size = batch_size
        self.identity = identity or identity_of(scorer, settings, {})
        self.fingerprint = self.identity["whole"]
        self.cache = ScoreCache(cache / self.fingerprint[:16] if cache else None)
        self.succeeded = 0
        self.failed = 0

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
        """float32 (N,). Raises DataError where the scorer breaks its contract or fails on all of
        the first images, OutsideError where one image is too much for the memory.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        keys = [score_key(*pair) for pair in zip(images, prompts, strict=True)]
        asked = [Asked(*one) for one in zip(images, prompts, _names(prompts), strict=True)]
        places = {key: place for place, key in enumerate(keys) if key not in self.cache}
        fresh: dict[bytes, float] = {}
        todo = sorted(places.values())
        while todo:
            batch, todo = todo[: self.batch_size], todo[self.batch_size :]
            scores = self._batch([asked[place] for place in batch])
            if scores is None:  # out of memory: once more, with the halved batch
                todo = batch + todo
                continue
            fresh |= {keys[place]: float(score) for place, score in zip(batch, scores, strict=True)}
        found = [fresh[key] if key in fresh else self.cache[key] for key in keys]
        self.cache.add({key: score for key, score in fresh.items() if np.isfinite(score)})
        return np.asarray(found, np.float32)

    def _batch(self, batch: Sequence[Asked]) -> np.ndarray | None:
        """Scores of some images; None after halving the batch for want of memory."""
        images, prompts, names = zip(*batch, strict=True)
        try:
            scores = checked_scores(
                self.scorer.score_batch(list(images), list(prompts)), len(batch), self.label
            )
        except CdpoError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                self._halve(len(batch), error)
                return None
            if isinstance(error, torch.AcceleratorError):  # stays: the next image would fail too
                raise OutsideError(
                    f"{self.label}: the device failed over {len(batch)} images from "
                    f"{names[0]} on: {told_by(error)}; start again",
                    self.label,
                    "device",
                ) from None
            if len(batch) > 1:
                alone = [self._batch([one]) for one in batch]
                # None never comes back for a single image: too little memory for it is an error.
                return np.concatenate([score for score in alone if score is not None])
            self._fail(names[0], f"{type(error).__name__}: {told_by(error)}")
            return np.full(1, np.nan, np.float32)
        self.succeeded += int(np.isfinite(scores).sum())
        for name, score in zip(names, scores, strict=True):
            if not np.isfinite(score):
                self._fail(name, self._why_not_finite(score), self.precision is not None)
        return scores

    def _halve(self, tried: int, error: Exception) -> None:
        if tried == 1:
            message = f"{self.label}: out of memory with one image at a time: {told_by(error)}"
            raise OutsideError(message, self.label, "too-large")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batch_size = tried // 2
        Terminal().warn(
            f"{self.label}: out of memory with {tried} images in one call; it goes on with "
            f"{self.batch_size} (batch_size={self.batch_size} in the recipe spares the attempt)"
        )

    def _why_not_finite(self, score: float) -> str:
        if self.precision in (None, "fp32"):
            return f"its score is {score:g}"
        return f"its score is {score:g} in {self.precision}: say precision: fp32 in its section"

    def _fail(self, name: str, reason: str, may_end: bool = True) -> None:
        self.failed += 1
        if may_end and not self.succeeded and self.failed >= HOPELESS:
            message = f"{self.label} failed on each of the first {HOPELESS} images: {reason}"
            raise DataError(message, self.label, "non-finite")
        if self.failed <= NAMED:
            Terminal().warn(f"{self.label}: no score for {name}, which is left out: {reason}")
        elif self.failed == NAMED + 1:
            Terminal().warn(f"{self.label}: further images without a score are counted, not named")


def checked_scores(scores: object, count: int, label: str = "the reward") -> np.ndarray:
    """``scores`` as float32 (count,); DataError for anything else that a reward returns."""
    scores = np.asarray(scores)
    if scores.shape != (count,) or not np.issubdtype(scores.dtype, np.floating):
        raise DataError(
            f"{label} returned {scores.dtype} of shape {scores.shape} for {count} images; one "
            "floating number an image is wanted",
            label,
            "mismatch" if scores.shape != (count,) else "wrong-type",
        )
    return scores.astype(np.float32)


def _names(prompts: Sequence[str]) -> list[str]:
    """``candidate 2 of 'a dog'``: images are counted for each prompt."""
    seen: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        names.append(f"candidate {seen[prompt]} of {prompt!r}")
        seen[prompt] += 1
    return names
