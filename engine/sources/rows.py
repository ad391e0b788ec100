"""What every kind of source gives: rows without their images, and the images of some of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from ..basics.errors import DataError, told_by
from .files import SourceFiles
from .left_out import LeftOut

ROWS_AT_ONCE = 256  # rows without images, read together
MAX_CAPTION_BYTES = 2**16
MAX_IMAGE_BYTES = 64 * 2**20  # an encoded image; the largest decoded one has 48 MB


class UnreadableImage(DataError):
    """An image that is missing, damaged or too large; the rows of a source may be few of these."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a source without its images.

    ``group`` and ``number`` say where in the file it lies: row group and row of a table, 0 and
    sample of a tar; ``where`` says it to people, e.g. ``row 17``. ``paths`` are those of images
    that are files, ``spans`` (offset, size, offset, size ...) those of images inside a tar; a table
    with images inside has neither.
    """

    group: int
    number: int
    values: dict[str, Any]
    paths: tuple[str, ...] = ()
    spans: tuple[int, ...] = ()
    where: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the images of a row are, as :class:`Row` says it."""

    number: int
    paths: tuple[str, ...]
    spans: tuple[int, ...]
    where: str = ""


Images = tuple[bytes | UnreadableImage, ...]


class RowReader(Protocol):
    """Reads one kind of source."""

    files: SourceFiles
    images: tuple[str, ...]
    """Columns of the images."""

    def columns(self) -> list[str]:
        """What a row has, the images included. DataError when files differ in it."""
        ...

    def rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[list[Row]]:
        """All rows of a file in their order, with the values of these columns; no list is longer
        than :data:`ROWS_AT_ONCE` or goes over the border of a group.

        What of the file makes no row is noted in ``left_out``, under the file's name in the data
        set: rows that cannot be read, and what lies beside the rows.
        """
        ...

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        """The encoded images of some rows of a group, which are given in their order."""
        ...


def in_lists(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in their order, :data:`ROWS_AT_ONCE` together and in the end the rest."""
    left = iter(rows)
    while found := list(islice(left, ROWS_AT_ONCE)):
        yield found


def describe(files: SourceFiles, file: int, where: str) -> str:
    """How messages name a row: ``data/train-00000.parquet row 17``."""
    return f"{files.paths[file]} {where}"


def load_file(path: Path) -> bytes | UnreadableImage:
    """The bytes of an image file, if it is a regular one of bounded size."""
    try:
        # Not O_RDONLY alone: opening a pipe that a table names would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                return UnreadableImage(f"{path}: is not a file", str(path), "wrong-type")
            if status.st_size > MAX_IMAGE_BYTES:
                return UnreadableImage(
                    f"{path}: {too_large(status.st_size)}", str(path), "too-large"
                )
            return os.pread(descriptor, status.st_size, 0)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        return UnreadableImage(f"{path}: {told_by(error)}", str(path), "unreadable")


def decoded_caption(data: bytes, where: str, key: str) -> str:
    """The text of a file with a caption; DataError naming ``where`` if it is none."""
    if len(data) > MAX_CAPTION_BYTES:
        return ""  # no caption: the row is left out and counted
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        told = f"{where} is not UTF-8 text (byte {error.start})"
        raise DataError(told, key, "unreadable") from None


def too_large(size: int) -> str:
    """Why an encoded image is not taken."""
    return f"{size} bytes, at most {MAX_IMAGE_BYTES} are taken"


def check_columns(
    wanted: Sequence[str], present: Sequence[str], where: str, key: str = "prepare.source"
) -> None:
    """DataError naming the columns that a source lacks, and those that it has; ``key`` of the
    recipe says what they are called.
    """
    missing = [name for name in wanted if name not in present]
    if not missing:
        return
    hint = ""
    if {"winner", "loser"} <= set(present):
        hint = "; for winner and loser: prepare.source.images=[winner,loser] and label=null"
    listed = ", ".join(name[:60] for name in present[:40]) + (", ..." if len(present) > 40 else "")
    raise DataError(
        f"{where}: has no column {' and no column '.join(missing)}; it has {listed or 'none'} (the "
        f"recipe's {key} says which is which{hint})",
        missing[0],
        "missing",
    )
