"""The candidate images of a prompt, kept as one webdataset tar a prompt.

A sample is `ID-NNNN.png` and `ID-NNNN.json`, ID being the prompt's id. The record holds the prompt,
the settings the image was made with and the image's sha256: a candidate made with other settings,
or damaged, never passes for the one that is wanted.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from ..keyed import content_id
from .atomic import atomic_file
from .sample import image_id
from .shard_error import ShardError
from .strict_tar import SampleIndex, index_samples, read_span

IMAGE, RECORD = "png", "json"
MAX_PIXELS = 4096 * 4096
MAX_IMAGE_BYTES = 4 * MAX_PIXELS
MAX_RECORD_BYTES = 64 * 1024


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
    with atomic_file(path) as file:
        tar = webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False)
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
        tar.close()
    return path


def read_candidates(
    folder: str | Path, prompt: str, expected_meta: Mapping[str, Any]
) -> list[Image.Image] | None:
    """The stored candidates, or None if there are none or they were made with other settings.

    Raises ShardError for a damaged file: remove it to have the prompt sampled again.
    """
    path = candidates_path(folder, prompt)
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ShardError(str(path), f"cannot be opened: {error.strerror or error}") from None
    with file:
        index = index_samples(file.fileno(), str(path), (IMAGE, RECORD))
        records = [_read_record(file.fileno(), path, index, row) for row in range(len(index))]
        if any(record.get("meta") != _as_json(expected_meta) for record in records):
            return None
        _check_complete(path, prompt, index, records)
        return [
            _read_image(file.fileno(), path, index, row, record)
            for row, record in enumerate(records)
        ]


def _as_json(meta: Mapping[str, Any]) -> Any:
    """As it comes back from a file: tuples are lists there, and keys are text."""
    return json.loads(json.dumps(dict(meta)))


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def _member(
    descriptor: int, path: Path, index: SampleIndex, row: int, column: int, limit: int
) -> bytes:
    size = int(index.sizes[row, column])
    if size > limit:
        key, member = index.keys[row].decode(), index.members[column]
        raise ShardError(str(path), f"{size} bytes, at most {limit} expected", key, member)
    return read_span(descriptor, str(path), int(index.offsets[row, column]), size)


def _read_record(descriptor: int, path: Path, index: SampleIndex, row: int) -> dict[str, Any]:
    data = _member(descriptor, path, index, row, 1, MAX_RECORD_BYTES)
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = f"not valid JSON ({error})"
        raise ShardError(str(path), reason, index.keys[row].decode(), RECORD) from None
    if not isinstance(record, dict):
        raise ShardError(str(path), "not a JSON object", index.keys[row].decode(), RECORD)
    return record


def _check_complete(
    path: Path, prompt: str, index: SampleIndex, records: Sequence[Mapping[str, Any]]
) -> None:
    for row, record in enumerate(records):
        key = index.keys[row].decode()
        if key != image_id(prompt, row) or record.get("prompt") != prompt:
            raise ShardError(str(path), "is not the next candidate of the prompt", key, RECORD)
        if record.get("num_candidates") != len(records):
            reason = f"{len(records)} candidates, {record.get('num_candidates')} were written"
            raise ShardError(str(path), reason, key, RECORD)


def _read_image(
    descriptor: int, path: Path, index: SampleIndex, row: int, record: Mapping[str, Any]
) -> Image.Image:
    key = index.keys[row].decode()
    data = _member(descriptor, path, index, row, 0, MAX_IMAGE_BYTES)
    if hashlib.sha256(data).hexdigest() != record.get("sha256"):
        raise ShardError(str(path), "image does not match its sha256; remove the file", key, IMAGE)
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > MAX_PIXELS:  # known from the header, nothing decoded yet
            reason = f"{image.width}x{image.height} pixels, at most {MAX_PIXELS} in all"
            raise ShardError(str(path), reason, key, IMAGE)
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ShardError(str(path), f"not a readable PNG ({error})", key, IMAGE) from None
    return image.convert("RGB")
