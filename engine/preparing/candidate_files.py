"""The candidate images of a prompt, kept as one webdataset tar a prompt.

A sample is `ID-NNNN.png` and `ID-NNNN.json`, ID being the prompt's id. The record holds the prompt,
the settings the image was made with and the image's sha256: a candidate made with other settings,
or damaged, never passes for the one that is wanted.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..basics.errors import ShardError, told_by
from ..basics.files import replacing
from ..basics.keyed import content_id
from ..shards.tar_index import SampleIndex, index_samples, read_span
from ..shards.writer import tar_writer

IMAGE, RECORD = "png", "json"
PARTS = "parts"  # key of the settings that holds the fingerprints of all that draws
MAX_PIXELS = 4096 * 4096
MAX_IMAGE_BYTES = 4 * MAX_PIXELS
MAX_RECORD_BYTES = 64 * 1024


def image_id(prompt: str, candidate: int) -> str:
    """The name of a candidate image: its prompt's id and its number."""
    return f"{content_id(prompt):016x}-{candidate:04d}"


def candidates_path(folder: str | Path, prompt: str) -> Path:
    """Where the candidates of a prompt are kept."""
    return Path(folder) / f"{content_id(prompt):016x}.tar"


def write_candidates(
    folder: str | Path, prompt: str, images: Sequence[Image.Image], meta: Mapping[str, Any]
) -> Path:
    """Store the candidates of a prompt, in their order, with the JSON-able settings ``meta``.

    The file appears when it is whole. Raises DataError when the disk is full.
    """
    path = candidates_path(folder, prompt)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file, tar_writer(file) as tar:
        for number, image in enumerate(images):
            picture = _encode(image)
            record = {
                "prompt": prompt,
                "candidate": number,
                "num_candidates": len(images),
                "sha256": hashlib.sha256(picture).hexdigest(),
                "meta": dict(meta),
            }
            text = json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
            tar.write({"__key__": image_id(prompt, number), IMAGE: picture, RECORD: text})
    return path


def read_candidates(
    folder: str | Path, prompt: str, expected_meta: Mapping[str, Any]
) -> list[Image.Image] | None:
    """The stored candidates, or None if there are none or they were made with other settings.

    Raises ShardError for a damaged file: remove it to have the prompt sampled again.
    """
    with _opened(folder, prompt, expected_meta) as stored:
        if stored is None:
            return None
        return [stored.image(row) for row in range(len(stored.index))]


def has_candidates(folder: str | Path, prompt: str, expected_meta: Mapping[str, Any]) -> bool:
    """Whether ``read_candidates`` would find them; an image may still be damaged."""
    with _opened(folder, prompt, expected_meta) as stored:
        return stored is not None


def differing_settings(
    folder: str | Path, prompt: str, expected_meta: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings of the stored candidates that are not the expected ones, as they are there; empty
    where nothing is stored or its first record cannot be read.
    """
    try:
        with candidates_path(folder, prompt).open("rb", buffering=0) as file:
            index = index_samples(file.fileno(), file.name, (IMAGE, RECORD))
            found = _Stored(file.fileno(), file.name, index).records[0].get("meta") or {}
    except (OSError, ShardError, IndexError):
        return {}
    wanted = _as_json(expected_meta)
    return {key: found[key] for key in found if found[key] != wanted.get(key)}


@contextmanager
def _opened(
    folder: str | Path, prompt: str, expected_meta: Mapping[str, Any]
) -> Iterator[_Stored | None]:
    """The file of a prompt with its records read and checked, or None as ``read_candidates``."""
    path = candidates_path(folder, prompt)
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        reason = f"cannot be opened: {told_by(error)}"
        raise ShardError(str(path), reason, kind="unreadable") from None
    with file:
        index = index_samples(file.fileno(), str(path), (IMAGE, RECORD))
        stored = _Stored(file.fileno(), str(path), index)
        yield stored if stored.made_with(prompt, _as_json(expected_meta)) else None


def _as_json(meta: Mapping[str, Any]) -> Any:
    """As it comes back from a file: tuples are lists there, and keys are text."""
    return json.loads(json.dumps(dict(meta)))


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


class _Stored:
    """The open tar of one prompt."""

    def __init__(self, descriptor: int, name: str, index: SampleIndex) -> None:
        self.descriptor, self.name, self.index = descriptor, name, index
        self.records = [self._record(row) for row in range(len(index))]

    def made_with(self, prompt: str, meta: Any) -> bool:
        """Whether all were made with these settings; if so they must be complete, in order.

        Images that are too old to tell the parts that made them are held to the rest.
        """
        old = {key: value for key, value in meta.items() if key != PARTS}
        if any(record.get("meta") not in (meta, old) for record in self.records):
            return False
        for row, record in enumerate(self.records):
            if self._key(row) != image_id(prompt, row) or record.get("prompt") != prompt:
                raise self._error(
                    row, RECORD, "is not the next candidate of the prompt", "mismatch"
                )
            if record.get("num_candidates") != len(self.records):
                written = record.get("num_candidates")
                reason = f"{len(self.records)} candidates, {written} were written"
                raise self._error(row, RECORD, reason, "missing")
        return True

    def image(self, row: int) -> Image.Image:
        """Decode a candidate, which must be the PNG that was written and of bounded size."""
        data = self._member(row, IMAGE, MAX_IMAGE_BYTES)
        if hashlib.sha256(data).hexdigest() != self.records[row].get("sha256"):
            reason = "image does not match its sha256; remove the file"
            raise self._error(row, IMAGE, reason, "damaged")
        try:
            image = Image.open(io.BytesIO(data), formats=("PNG",))
            if image.width * image.height > MAX_PIXELS:  # from the header, nothing is decoded yet
                size = f"{image.width}x{image.height}"
                reason = f"{size} pixels, at most {MAX_PIXELS} in all"
                raise self._error(row, IMAGE, reason, "too-large")
            return image.convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise self._error(
                row, IMAGE, f"not a readable PNG ({told_by(error)})", "damaged"
            ) from None

    def _record(self, row: int) -> dict[str, Any]:
        try:
            record = json.loads(self._member(row, RECORD, MAX_RECORD_BYTES))
        except (ValueError, RecursionError) as error:
            raise self._error(
                row, RECORD, f"not valid JSON ({told_by(error)})", "damaged"
            ) from None
        if not isinstance(record, dict):
            raise self._error(row, RECORD, "not a JSON object", "wrong-type")
        return record

    def _member(self, row: int, member: str, limit: int) -> bytes:
        column = self.index.members.index(member)
        size = int(self.index.sizes[row, column])
        if size > limit:
            reason = f"{size} bytes, at most {limit} expected"
            raise self._error(row, member, reason, "too-large")
        offset = int(self.index.offsets[row, column])
        return read_span(self.descriptor, self.name, offset, size)

    def _key(self, row: int) -> str:
        return self.index.keys[row].decode()

    def _error(self, row: int, member: str, reason: str, kind: str) -> ShardError:
        return ShardError(self.name, reason, self._key(row), member, kind)
