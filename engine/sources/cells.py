"""Cells of tables that hold images: bytes, paths of files, objects with either, lists of those."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..basics.errors import DataError
from .files import SourceFiles
from .rows import Images, Place, describe, load_file

MAX_PATH = 4096  # characters, and bytes of a path that Linux takes
# What people write into a table in place of a path, by how it begins.
_NO_PATHS = {
    "data:": "a data URI",
    "http://": "a URL",
    "https://": "a URL",
    "s3://": "a URL",
    "gs://": "a URL",
    "hf://": "a URL",
    "b'": "bytes as Python spells them",
    'b"': "bytes as Python spells them",
    "{": "an object that was written out",
    "[": "a list that was written out",
    "<": "an object of Python",
    "iVBORw0KGgo": "a PNG as base64",
    "/9j/": "a JPEG as base64",
    "UklGR": "a WebP as base64",
}
_BEGINNINGS = tuple(_NO_PATHS)


@dataclass(frozen=True)
class ImageCells:
    """The columns with a row's images: one for each, or a single one, ``listed``, with a list."""

    names: tuple[str, ...]
    """What each image is called: its column, or its place in the list."""
    listed: str | None = None

    @classmethod
    def of(cls, images: str | Sequence[str]) -> ImageCells:
        """As `prepare.source.images` says it: two columns, or one with lists of two."""
        if isinstance(images, str):
            return cls((f"{images}[0]", f"{images}[1]"), images)
        return cls(tuple(images))

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.listed,) if self.listed else self.names

    def paths(
        self, values: Mapping[str, Any], files: SourceFiles, file: int, where: str
    ) -> tuple[str, ...]:
        """The paths in a row's cells, empty where there is none or ``values`` lack the column.

        DataError, short whatever a cell holds, where one is of another kind.
        """
        own: list[Any] = [values.get(name) for name in self.columns]
        cells = own[0] if self.listed else own
        if not isinstance(cells, list) or len(cells) != len(self.names):
            found = f"{len(cells)} images" if isinstance(cells, list) else _shown(cells)
            told = f"{self.listed} holds {found}, not a list of {len(self.names)} images"
            raise _wrong(files, file, where, told, str(self.listed))
        return tuple(
            _path(cell, files, file, where, name)
            for cell, name in zip(cells, self.names, strict=True)
        )

    def each(
        self,
        values: dict[str, Any],
        columns: Sequence[str],
        files: SourceFiles,
        file: int,
        where: str,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where a row is, and its values; where the column of a single image holds a list, a row
        for each image, to which lists in other ``columns`` give a value each.

        DataError for a list that is not as long, or empty.
        """
        images = values.get(self.names[0]) if len(self.names) == 1 else None
        if not isinstance(images, list):
            yield where, values
            return
        lists = {name: values[name] for name in columns if isinstance(values[name], list)}
        lists[self.names[0]] = images
        for name, cells in lists.items():
            if len(cells) != len(images) or not images:
                told = f"{name} holds {len(cells)} values for {len(images)} images"
                raise _wrong(files, file, where, told, name, "mismatch")
        for place in range(len(images)):
            own = {name: cells[place] for name, cells in lists.items()}
            yield f"{where} image {place + 1}", values | own


def load_beside(files: SourceFiles, file: int, places: Sequence[Place]) -> Iterator[Images]:
    """Images that are files, named relative to the folder of their table."""
    folder = files.beside(file)
    for place in places:
        yield tuple(load_file(folder / path) for path in place.paths)


def _path(cell: Any, files: SourceFiles, file: int, where: str, name: str) -> str:
    if isinstance(cell, dict):  # as `datasets` writes an image
        cell = cell.get("path") if cell.get("bytes") is None else cell
    if cell is None:
        return ""
    if isinstance(cell, str):
        what = ""
        if cell.startswith(_BEGINNINGS):
            what = next(_NO_PATHS[begin] for begin in _NO_PATHS if cell.startswith(begin))
        elif len(cell) > MAX_PATH:
            what = f"a text of {len(cell)} characters"
        if not what:
            try:
                cell.encode()
                return cell
            except UnicodeEncodeError:
                what = "half a character"
    else:
        what = f"a value of type {type(cell).__name__}"
    told = f"{name} holds {what} ({_shown(cell)}) where the path of an image is wanted, or bytes in"
    raise _wrong(files, file, where, f"{told} parquet or tars", name)


def _shown(cell: Any) -> str:
    text = repr(cell[:40] if isinstance(cell, str) else cell)
    return text if len(text) <= 60 else f"{text[:40]}..."


def _wrong(
    files: SourceFiles, file: int, where: str, told: str, column: str, kind: str = "wrong-type"
) -> DataError:
    return DataError(f"{describe(files, file, where)}: {told}", column, kind)
