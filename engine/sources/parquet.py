"""Parquet with images inside: bytes, or structs as Hugging Face's `datasets` writes them; or beside
it, named by their paths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..basics.errors import DataError, told_by
from ..basics.files import refuse_pointer
from .cells import ImageCells
from .files import SourceFiles
from .left_out import LeftOut
from .rows import (
    MAX_IMAGE_BYTES,
    Images,
    Place,
    Row,
    UnreadableImage,
    check_columns,
    describe,
    in_lists,
    load_file,
    too_large,
)

# Parquet is read a row at a time: a few kilobytes may say that all rows of a group have one value
# of gigabytes, which is there as often as rows are read together.
AT_ONCE = 1
MAX_ROW_BYTES = 2**20  # of a row without its images
STREAM_BUFFER = 2**20  # bytes read at once from a column of a row group
Numbered = Iterator[tuple[int, pa.RecordBatch]]


class ParquetReader:
    """Parquet files of one schema. Columns are read in pages: a row group may be of any size.

    An image is a cell of bytes, a path, or a struct of either: of its `bytes`, or where these are
    null of its `path`. ``images.listed`` is a column with a list of those.
    """

    def __init__(self, files: SourceFiles, images: ImageCells) -> None:
        self.files = files
        self.cells = images
        self.images = images.names
        self._reading: tuple[int, int, int, Numbered] | None = None

    def columns(self) -> list[str]:
        with _opened(self.files.paths[0]) as table:
            return list(table.schema_arrow.names)

    def rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[list[Row]]:
        with _opened(self.files.paths[file]) as table:
            schema = table.schema_arrow
            check_columns(
                [*columns, *self.cells.columns], schema.names, str(self.files.paths[file])
            )
            self._check_types(file, schema)
            numbers = count()
            for group in range(table.num_row_groups):
                yield from in_lists(self._rows(table, file, group, columns, numbers))

    def _rows(
        self,
        table: pq.ParquetFile,
        file: int,
        group: int,
        columns: Sequence[str],
        numbers: Iterator[int],
    ) -> Iterator[Row]:
        named = self._paths_of(table, group)
        for batch in table.iter_batches(AT_ONCE, [group], [*columns, *named]):
            number = next(numbers)
            where = f"row {number}"
            if batch.nbytes > MAX_ROW_BYTES:
                raise DataError(
                    f"{describe(self.files, file, where)}: holds {batch.nbytes} bytes "
                    f"beside its images, at most {MAX_ROW_BYTES} are taken",
                    str(self.files.paths[file]),
                    "too-large",
                )
            [values] = batch.to_pylist()
            paths = self.cells.paths(values, self.files, file, where) if named else ()
            yield Row(group, number, values, paths, where=where)

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        """A group is read on from where the last call left it: another one reads from its start."""
        if not places:
            return
        before, self._reading = self._reading, None
        if before and before[:2] == (file, group) and before[2] < places[0].number:
            batches = before[3]
        else:
            batches = _batches(self.files.paths[file], group, self.cells.columns)
        for place in places:
            batch = next((batch for number, batch in batches if number == place.number), None)
            if batch is None:
                return
            yield self._images(file, batch, place)
        self._reading = (file, group, places[-1].number, batches)

    def _images(self, file: int, batch: pa.RecordBatch, place: Place) -> Images:
        if self.cells.listed is None:
            cells = [batch.column(name)[0] for name in self.images]
        else:
            cells = list(batch.column(0)[0].values or ())
        if len(cells) != len(self.images):
            told = f"holds {len(cells)} images, not {len(self.images)}"
            return (UnreadableImage(told, kind="mismatch"),) * len(self.images)
        folder, found = self.files.beside(file), []
        for cell, path in zip(cells, place.paths or [""] * len(cells), strict=True):
            data = _bytes_in(cell)
            found.append(load_file(folder / path) if data is None and path else data)
        missing = UnreadableImage("is null", kind="missing")
        return tuple(missing if data is None else data for data in found)

    def _paths_of(self, table: pq.ParquetFile, group: int) -> list[str]:
        """The columns of a group, as deep as they lie, that say where images are; none where all
        images are inside.
        """
        leaves = [table.schema.column(number).path for number in range(len(table.schema))]
        chunks = table.metadata.row_group(group)
        found = []
        for name in self.cells.columns:
            own = [leaf for leaf in leaves if leaf.split(".")[0] == name]
            if not _is_text(_kind(table.schema_arrow.field(name).type)):
                inside = [leaf for leaf in own if leaf.endswith(".bytes")]
                known = [chunks.column(leaves.index(leaf)).statistics for leaf in inside]
                if known and all(facts and facts.null_count == 0 for facts in known):
                    continue
                own = [leaf for leaf in own if leaf.endswith(".path")]
            found += own
        return found

    def _check_types(self, file: int, schema: pa.Schema) -> None:
        for name in self.cells.columns:
            kind = schema.field(name).type
            if _is_list(kind) != bool(self.cells.listed) or not _holds_images(_kind(kind)):
                listed = "lists of " if self.cells.listed else ""
                raise DataError(
                    f"{self.files.paths[file]}: column {name} holds {kind}, not images: {listed}"
                    "bytes, structs with a field `bytes` or `path`, or paths are wanted",
                    name,
                    "wrong-type",
                )


def _batches(path: Path, group: int, columns: Sequence[str]) -> Numbered:
    """Some columns of each row of a group, under the row's number in the file."""
    with _opened(path) as table:
        first = sum(table.metadata.row_group(before).num_rows for before in range(group))
        yield from enumerate(table.iter_batches(AT_ONCE, [group], list(columns)), first)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    refuse_pointer(path)
    try:
        with pq.ParquetFile(path, buffer_size=STREAM_BUFFER, pre_buffer=False) as table:
            yield table
    except (pa.ArrowException, OSError) as error:
        told = f"{path}: cannot be read as parquet: {told_by(error)}"
        raise DataError(told, str(path), "unreadable") from None


def _bytes_in(cell: pa.Scalar) -> bytes | UnreadableImage | None:
    """The bytes of an image; its length is looked at before anything is copied."""
    if pa.types.is_struct(cell.type):
        cell = cell["bytes"] if cell.type.get_field_index("bytes") >= 0 else None
    if cell is None or not cell.is_valid or not _is_bytes(cell.type):
        return None
    buffer = cell.as_buffer()
    if buffer.size > MAX_IMAGE_BYTES:
        return UnreadableImage(too_large(buffer.size), kind="too-large")
    return buffer.to_pybytes()


def _kind(kind: pa.DataType) -> pa.DataType:
    """The type of an image, or of those in a list."""
    return kind.value_type if _is_list(kind) else kind


def _holds_images(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_text(kind) or _is_bytes(kind)
    fields = {field.name: field.type for field in kind}
    return _is_bytes(fields.get("bytes", pa.null())) or _is_text(fields.get("path", pa.null()))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
