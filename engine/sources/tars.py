"""Webdataset tars of other people: images as members, everything else in KEY.json or KEY.txt.

The project's own strict reader takes plain USTAR alone; webdataset's writer, given no time to
stamp, adds pax headers, and GNU tar has a format of its own. So headers are parsed by `tarfile`,
and what it and webdataset are silent about is checked here: links, members that are missing or come
up twice, keys that come up again, a tar that was cut off, a second tar behind the end of the first.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ..basics.errors import DataError, told_by
from ..basics.files import refuse_pointer
from .files import IMAGE_ENDINGS, SourceFiles, is_of_a_desktop
from .left_out import LeftOut
from .rows import (
    MAX_IMAGE_BYTES,
    Images,
    Place,
    Row,
    UnreadableImage,
    check_columns,
    decoded_caption,
    in_lists,
    too_large,
)

RECORD, TEXT = "json", "txt"
MAX_RECORD_BYTES = 2**20
OTHERS, OF_A_DESKTOP, NO_END = "other members", "members of a desktop", "tars without an end"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
Span = tuple[int, int]


@dataclass
class _Sample:
    """A key and what it has: the place of each wanted member, and the full names of all."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)


class TarReader:
    """Tars whose samples are KEY.IMAGE for every image, and KEY.json or KEY.txt or both.

    The text is the caption where KEY.json has none. A member belongs to the wanted name that is its
    longest ending, so keys may hold dots; an image's name that is an ending of pictures stands for
    all of them. What nothing claims is noted.
    """

    def __init__(self, files: SourceFiles, images: tuple[str, ...], caption: str) -> None:
        self.files = files
        self.images = images
        self.caption = caption
        self._any_image = {_any_ending(name): name for name in images}
        if len(self._any_image) < len(images):  # as of jpg and png: each stands for itself
            self._any_image = {}

    def columns(self) -> list[str]:
        for sample in self._samples(0, LeftOut()):
            return [*self.images, *self._record(0, sample)]
        path = self.files.paths[0]
        raise DataError(f"{path}: holds no samples", str(path), "empty")

    def rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[list[Row]]:
        yield from in_lists(self._rows(file, columns, left_out))

    def _rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[Row]:
        for number, sample in enumerate(self._samples(file, left_out)):
            record = self._record(file, sample)
            where = f"key {sample.key}"
            check_columns(columns, list(record), f"{self.files.paths[file]} {where}")
            spans = tuple(part for name in self.images for part in sample.members[name])
            values = {name: record[name] for name in columns}
            yield Row(0, number, values, spans=spans, where=where)

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        path = self.files.paths[file]
        with path.open("rb", buffering=0) as tar:
            for place in places:
                spans = zip(place.spans[::2], place.spans[1::2], strict=True)
                yield tuple(_read(tar.fileno(), *span) for span in spans)

    def _samples(self, file: int, left_out: LeftOut) -> Iterator[_Sample]:
        """Every sample, whole."""
        path, name = self.files.paths[file], self.files.name(file)
        seen: set[str] = set()
        stem, group = "", dict[str, _Sample]()
        for member, span in _regular_files(path, name, left_out):
            if is_of_a_desktop(member):
                left_out.pass_over(name, member, OF_A_DESKTOP)
                continue
            own, key, column, is_exact = self._claim(member)
            if own != stem:
                yield from self._whole(path, name, group, seen, left_out)
                stem, group = own, {}
            sample = group.setdefault(key, _Sample(key))
            if column is None:
                left_out.pass_over(name, member, OTHERS)
                sample.names.setdefault(member, member)
                continue
            before = sample.names.get(column)
            if before is not None and is_exact == self._is_exact(key, column, before):
                told = f"{path} key {key}: member {column} comes up twice"
                raise DataError(told, key, "duplicate")
            if before is not None:
                left_out.pass_over(name, before if is_exact else member, OTHERS)
            if before is None or is_exact:
                sample.members[column], sample.names[column] = span, member
        yield from self._whole(path, name, group, seen, left_out)

    def _claim(self, member: str) -> tuple[str, str, str | None, bool]:
        """Of a member's name: what stands before its first dot, its key, the wanted name that it
        goes by, if any, and whether it is that very name.
        """
        folder, slash, base = member.rpartition("/")
        pieces = base.split(".")
        for cut in range(1, len(pieces)):
            key, ending = ".".join(pieces[:cut]), ".".join(pieces[cut:])
            is_exact = ending in (*self.images, RECORD, TEXT)
            column = ending if is_exact else self._any_image.get(_any_ending(ending))
            if column is None and ending.lower() in (RECORD, TEXT):
                column = ending.lower()
            if column is not None:
                return folder + slash + pieces[0], folder + slash + key, column, is_exact
        return folder + slash + pieces[0], folder + slash + pieces[0], None, False

    def _is_exact(self, key: str, column: str, member: str) -> bool:
        return member == f"{key}.{column}"

    def _whole(
        self,
        path: Path,
        name: str,
        group: dict[str, _Sample],
        seen: set[str],
        left_out: LeftOut,
    ) -> Iterator[_Sample]:
        """The samples whose keys share what stands before the first dot, each of them whole.

        Beside a whole ``0001`` an incomplete ``0001.mask`` is no sample but a side file.
        """
        whole = {key for key, sample in group.items() if not self._missing(sample)}
        for key, sample in group.items():
            if key not in whole:
                dots = [at for at, character in enumerate(key) if character == "."]
                is_aside = any(key[:at] in whole or key[:at] in seen for at in dots)
                if is_aside or not sample.members.keys() & {*self.images, RECORD}:
                    for column in sample.members:
                        left_out.pass_over(name, sample.names[column], OTHERS)
                    continue
                raise DataError(
                    f"{path} key {key}: member {' and '.join(self._missing(sample))} is missing; "
                    f"it has {', '.join(sample.names)} (prepare.source.images says which are the "
                    "images)",
                    key,
                    "missing",
                )
            if key in seen:
                told = f"{path} key {key}: comes up again after another key"
                raise DataError(told, key, "duplicate")
            seen.add(key)
            yield sample

    def _missing(self, sample: _Sample) -> list[str]:
        lost = [name for name in self.images if name not in sample.members]
        return lost if {RECORD, TEXT} & sample.members.keys() else [*lost, RECORD]

    def _record(self, file: int, sample: _Sample) -> dict[str, Any]:
        path, key = self.files.paths[file], sample.key
        record: Any = {}
        if RECORD in sample.members:
            try:
                record = json.loads(self._text(path, key, RECORD, sample.members[RECORD]))
            except (ValueError, RecursionError) as error:
                told = f"{path} key {key}: {RECORD} is not valid JSON ({told_by(error)})"
                raise DataError(told, key, "damaged") from None
        if not isinstance(record, dict):
            raise DataError(f"{path} key {key}: {RECORD} is not a JSON object", key, "wrong-type")
        if TEXT in sample.members and record.get(self.caption) is None:
            text = self._text(path, key, TEXT, sample.members[TEXT])
            record[self.caption] = decoded_caption(text, f"{path} key {key}: {TEXT}", key)
        return record

    def _text(self, path: Path, key: str, column: str, span: Span) -> bytes:
        offset, size = span
        if size > MAX_RECORD_BYTES:
            told = f"{path} key {key}: {column} has {size} bytes, over {MAX_RECORD_BYTES}"
            raise DataError(told, key, "too-large")
        with path.open("rb") as tar:
            return os.pread(tar.fileno(), size, offset)


def _any_ending(name: str) -> str:
    """``jpg`` and ``PNG`` come to the same, so do ``left.jpg`` and ``left.webp``."""
    first, dot, last = name.rpartition(".")
    return f"{first}{dot}*" if f".{last.lower()}" in IMAGE_ENDINGS else name


def _regular_files(path: Path, name: str, left_out: LeftOut) -> Iterator[tuple[str, Span]]:
    """Name, offset and size of every file in a tar, which must be whole and hold nothing else but
    folders. Tars that were joined by `cat` are read as one.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            refuse_pointer(path)
            _check_head(path, os.pread(file.fileno(), 100, 0))
            start: int | None = 0
            while start is not None:
                file.seek(start)
                end = yield from _one_archive(path, file)
                start = _next_archive(file.fileno(), end)
                if start is None and end >= size:
                    left_out.pass_over(name, "", NO_END, detail="perhaps it was cut off")
    except (tarfile.TarError, OSError, ValueError) as error:
        told = f"{path}: cannot be read as a tar: {told_by(error)}"
        raise DataError(told, str(path), "unreadable") from None


def _one_archive(path: Path, file: BinaryIO) -> Generator[tuple[str, Span], None, int]:
    """The files of the tar that begins here; returns where it ends."""
    first, size, end = file.tell(), os.fstat(file.fileno()).st_size, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                # tarfile would keep a record of each.
                tar.members = []  # type: ignore[attr-defined]
                end = member.offset_data + member.size
                if member.type == tarfile.DIRTYPE:
                    continue
                if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
                    what = "is a link or another special file, only regular files are taken"
                    raise DataError(
                        f"{path}: {member.name[:160]!r} {what}", str(path), "unsupported"
                    )
                yield member.name, (member.offset_data, member.size)
            end = tar.offset
    except tarfile.ReadError:
        # Only the blanks behind the last member are missing; all of it is there.
        if not first < end <= size < end + tarfile.BLOCKSIZE:
            raise
        return size
    # tarfile takes whatever is no header for the end.
    if end < size and os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
        told = f"{path}: is cut off or damaged at byte {end}: no end of the archive"
        raise DataError(told, str(path), "damaged")
    return end


def _next_archive(descriptor: int, offset: int) -> int | None:
    """The first block from ``offset`` on that is not blank."""
    while block := os.pread(descriptor, 2**20, offset):
        for start in range(0, len(block), tarfile.BLOCKSIZE):
            if any(block[start : start + tarfile.BLOCKSIZE]):
                return offset + start
        offset += len(block)
    return None


def _check_head(path: Path, head: bytes) -> None:
    for magic, name in COMPRESSED.items():
        if head.startswith(magic):
            told = f"{path}: is compressed with {name}: unpack it, images are read where they lie"
            raise DataError(told, str(path), "unsupported")


def _read(descriptor: int, offset: int, size: int) -> bytes | UnreadableImage:
    if size > MAX_IMAGE_BYTES:
        return UnreadableImage(too_large(size), kind="too-large")
    return os.pread(descriptor, size, offset)
