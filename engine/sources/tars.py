"""Webdataset tars of other people: images as members, everything else in KEY.json.

The project's own strict reader takes plain USTAR alone; webdataset's writer, given no time to
stamp, adds pax headers, and GNU tar has a format of its own. So headers are parsed by `tarfile`,
and what it and webdataset are silent about is checked here: links, members that are missing or come
up twice, keys that come up again, a tar that was cut off.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..basics.errors import DataError, told_by
from .files import SourceFiles
from .left_out import LeftOut
from .rows import (
    MAX_IMAGE_BYTES,
    ROWS_AT_ONCE,
    Images,
    Place,
    Row,
    UnreadableImage,
    check_columns,
    too_large,
)

RECORD = "json"
MAX_RECORD_BYTES = 2**20
Span = tuple[int, int]


class TarReader:
    """Tars whose samples are KEY.IMAGE for every image and KEY.json; other members are ignored."""

    def __init__(self, files: SourceFiles, images: tuple[str, ...]) -> None:
        self.files = files
        self.images = images

    def columns(self) -> list[str]:
        for sample in self._samples(0):
            return [*self.images, *self._record(0, *sample)]
        path = self.files.paths[0]
        raise DataError(f"{path}: holds no samples", str(path), "empty")

    def rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[list[Row]]:
        found: list[Row] = []
        for number, (key, members) in enumerate(self._samples(file)):
            record = self._record(file, key, members)
            check_columns(columns, list(record), f"{self.files.paths[file]} key {key}")
            spans = tuple(part for name in self.images for part in members[name])
            values = {name: record[name] for name in columns}
            found.append(Row(0, number, values, spans=spans, where=f"key {key}"))
            if len(found) == ROWS_AT_ONCE:
                yield found
                found = []
        if found:
            yield found

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        path = self.files.paths[file]
        with path.open("rb", buffering=0) as tar:
            for place in places:
                spans = zip(place.spans[::2], place.spans[1::2], strict=True)
                yield tuple(_read(tar.fileno(), *span) for span in spans)

    def _samples(self, file: int) -> Iterator[tuple[str, dict[str, Span]]]:
        """Key and place of the members of every sample, each whole."""
        path = self.files.paths[file]
        wanted = (*self.images, RECORD)
        seen: set[str] = set()
        key, members = "", dict[str, Span]()
        for name, span in _regular_files(path):
            folder, _, base = name.rpartition("/")
            stem, _, member = base.partition(".")
            owner = f"{folder}/{stem}" if folder else stem
            if owner != key:
                if key and any(want in members for want in wanted):
                    yield key, _whole(path, key, members, wanted)
                if owner in seen:
                    told = f"{path} key {owner}: comes up again after another key"
                    raise DataError(told, owner, "duplicate")
                seen.add(owner)
                key, members = owner, {}
            if member in members:
                told = f"{path} key {key}: member {member} comes up twice"
                raise DataError(told, key, "duplicate")
            members[member] = span
        if key and any(want in members for want in wanted):
            yield key, _whole(path, key, members, wanted)

    def _record(self, file: int, key: str, members: dict[str, Span]) -> dict[str, Any]:
        path = self.files.paths[file]
        offset, size = members[RECORD]
        if size > MAX_RECORD_BYTES:
            told = f"{path} key {key}: {RECORD} has {size} bytes, over {MAX_RECORD_BYTES}"
            raise DataError(told, key, "too-large")
        with path.open("rb") as tar:
            text = os.pread(tar.fileno(), size, offset)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            told = f"{path} key {key}: {RECORD} is not valid JSON ({told_by(error)})"
            raise DataError(told, key, "damaged") from None
        if not isinstance(record, dict):
            raise DataError(f"{path} key {key}: {RECORD} is not a JSON object", key, "wrong-type")
        return record


def _regular_files(path: Path) -> Iterator[tuple[str, Span]]:
    """Name, offset and size of every file in a tar, which must be whole and hold nothing else but
    folders.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile would keep a record of each.
                tar.members = []  # type: ignore[attr-defined]
                if member.type == tarfile.DIRTYPE:
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    what = "is a link or another special file, only regular files are taken"
                    raise DataError(
                        f"{path}: {member.name[:160]!r} {what}", str(path), "unsupported"
                    )
                yield member.name, (member.offset_data, member.size)
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError) as error:
        told = f"{path}: cannot be read as a tar: {told_by(error)}"
        raise DataError(told, str(path), "unreadable") from None
    with path.open("rb") as file:
        # tarfile takes whatever is no header for the end.
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            told = f"{path}: is cut off or damaged at byte {end}: no end of the archive"
            raise DataError(told, str(path), "damaged")


def _whole(
    path: Path, key: str, members: dict[str, Span], wanted: Sequence[str]
) -> dict[str, Span]:
    missing = [name for name in wanted if name not in members]
    if missing:
        raise DataError(
            f"{path} key {key}: member {' and '.join(missing)} is missing; it has "
            f"{', '.join(members)} (prepare.source.images says which are the images)",
            key,
            "missing",
        )
    return members


def _read(descriptor: int, offset: int, size: int) -> bytes | UnreadableImage:
    if size > MAX_IMAGE_BYTES:
        return UnreadableImage(too_large(size), kind="too-large")
    return os.pread(descriptor, size, offset)
