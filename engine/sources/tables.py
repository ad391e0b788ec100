"""Tables: parquet with images inside or beside it, CSV with images beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

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
    describe,
    load_file,
    too_large,
)

# Parquet is read a row at a time: a few kilobytes may say that all rows of a group have one value
# of gigabytes, which is there as often as rows are read together.
AT_ONCE = 1
MAX_ROW_BYTES = 2**20  # of a row without its images
STREAM_BUFFER = 2**20  # bytes read at once from a column of a row group


class ParquetReader:
    """Parquet files of one schema; images are bytes, structs with `bytes` (as Hugging Face's
    `datasets` writes them) or paths. Columns are read in pages: a row group may be of any size.
    """

    def __init__(self, files: SourceFiles, images: tuple[str, ...]) -> None:
        self.files = files
        self.images = images

    def columns(self) -> list[str]:
        with self._opened(0) as table:
            return list(table.schema_arrow.names)

    def rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[list[Row]]:
        with self._opened(file) as table:
            schema = table.schema_arrow
            check_columns([*columns, *self.images], schema.names, str(self.files.paths[file]))
            as_paths = all(_is_text(schema.field(name).type) for name in self.images)
            self._check_types(file, schema)
            wanted = [*columns, *(self.images if as_paths else ())]
            number, found = 0, list[Row]()
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(AT_ONCE, [group], wanted):
                    where = f"row {number}"
                    if batch.nbytes > MAX_ROW_BYTES:
                        raise DataError(
                            f"{describe(self.files, file, where)}: holds {batch.nbytes} bytes "
                            f"beside its images, at most {MAX_ROW_BYTES} are taken",
                            str(self.files.paths[file]),
                            "too-large",
                        )
                    [values] = batch.to_pylist()
                    paths = self._paths(values) if as_paths else ()
                    found.append(Row(group, number, values, paths, where=where))
                    number += 1
                    if len(found) == ROWS_AT_ONCE:
                        yield found
                        found = []
                if found:
                    yield found
                    found = []

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        if places and places[0].paths:
            yield from load_beside(self.files, file, places)
            return
        wanted = iter(places)
        place = next(wanted, None)
        with self._opened(file) as table:
            first = sum(table.metadata.row_group(before).num_rows for before in range(group))
            for batch in table.iter_batches(AT_ONCE, [group], list(self.images)):
                if place is not None and place.number == first:
                    yield tuple(_cell(batch.column(name)[0]) for name in self.images)
                    place = next(wanted, None)
                if place is None:
                    return
                first += 1

    def _paths(self, values: dict[str, Any]) -> tuple[str, ...]:
        return tuple(values[name] or "" for name in self.images)

    def _check_types(self, file: int, schema: pa.Schema) -> None:
        for name in self.images:
            kind = schema.field(name).type
            if not (_is_text(kind) or _is_bytes(kind) or _has_bytes(kind)):
                raise DataError(
                    f"{self.files.paths[file]}: column {name} holds {kind}, not images: bytes, a "
                    "struct with a field `bytes`, or paths are wanted",
                    name,
                    "wrong-type",
                )

    @contextmanager
    def _opened(self, file: int) -> Iterator[pq.ParquetFile]:
        path = self.files.paths[file]
        try:
            with pq.ParquetFile(path, buffer_size=STREAM_BUFFER, pre_buffer=False) as table:
                yield table
        except (pa.ArrowException, OSError) as error:
            told = f"{path}: cannot be read as parquet: {told_by(error)}"
            raise DataError(told, str(path), "unreadable") from None


class CsvReader:
    """CSV files with a header; every image is a path, relative to the folder of its table."""

    def __init__(self, files: SourceFiles, images: tuple[str, ...], delimiter: str = ",") -> None:
        self.files = files
        self.images = images
        self.delimiter = delimiter

    def columns(self) -> list[str]:
        with self._opened(0, ()) as table:
            return list(table.schema.names)

    def rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[list[Row]]:
        with self._opened(file, ()) as table:
            check_columns([*columns, *self.images], table.schema.names, str(self.files.paths[file]))
        number = 0
        with self._opened(file, (*columns, *self.images)) as table:
            for block in table:
                for start in range(0, len(block), ROWS_AT_ONCE):
                    rows = block.slice(start, ROWS_AT_ONCE).to_pylist()
                    yield [
                        Row(
                            0,
                            number + index,
                            row,
                            tuple(row[name] for name in self.images),
                            where=f"row {number + index}",
                        )
                        for index, row in enumerate(rows)
                    ]
                    number += len(rows)

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        yield from load_beside(self.files, file, places)

    @contextmanager
    def _opened(self, file: int, columns: Sequence[str]) -> Iterator[pc.CSVStreamingReader]:
        """All columns as text, which is what a file of text has; none given: the header's."""
        path = self.files.paths[file]
        convert = pc.ConvertOptions(
            include_columns=list(columns) or None,
            column_types={name: pa.string() for name in columns},
            strings_can_be_null=False,
            quoted_strings_can_be_null=False,
        )
        parse = pc.ParseOptions(delimiter=self.delimiter, newlines_in_values=True)
        try:
            with pc.open_csv(path, parse_options=parse, convert_options=convert) as table:
                yield table
        except (pa.ArrowException, OSError) as error:
            told = f"{path}: cannot be read as CSV: {told_by(error)}"
            raise DataError(told, str(path), "unreadable") from None


def load_beside(files: SourceFiles, file: int, places: Sequence[Place]) -> Iterator[Images]:
    """Images that are files, named relative to the folder of their table."""
    folder = files.paths[file].parent
    for place in places:
        yield tuple(load_file(folder / path) for path in place.paths)


def _cell(cell: pa.Scalar) -> bytes | UnreadableImage:
    """The bytes of an image; its length is looked at before anything is copied."""
    if pa.types.is_struct(cell.type):
        cell = cell["bytes"]
    if not cell.is_valid:
        return UnreadableImage("is null", kind="missing")
    buffer = cell.as_buffer()
    if buffer.size > MAX_IMAGE_BYTES:
        return UnreadableImage(too_large(buffer.size), kind="too-large")
    return buffer.to_pybytes()


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _has_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(
        kind.field(index).name == "bytes" and _is_bytes(kind.field(index).type)
        for index in range(kind.num_fields)
    )
