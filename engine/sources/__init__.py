"""Preference data that is already there: read in a stream, row by row, from tables, tars, folders.

`files` finds it, `tables`, `tars` and `folders` read rows, `records` decides which of them say
something, `index` keeps those on disk, `loading` and `pictures` bring their images, `pairing` makes
pairs in tiers of them.
"""

from __future__ import annotations

from ..recipe import Imported, Paired, Ranked
from .files import SourceFiles, find_files
from .folders import FolderReader
from .rows import RowReader
from .tables import CsvReader, ParquetReader
from .tars import TarReader

__all__ = ["SourceFiles", "find_files", "image_columns", "open_source"]


def image_columns(spec: Imported) -> tuple[str, ...]:
    """Where the images of a row are: two columns of a pair, one of a ranked image."""
    if isinstance(spec, Paired):
        return spec.images
    assert isinstance(spec, Ranked)
    return (spec.image,)


def open_source(spec: Imported) -> RowReader:
    """The reader of a recipe's data set; DataError if there is none, or none that can be read."""
    columns = image_columns(spec)
    files = find_files(spec.path, columns if isinstance(spec, Paired) else None)
    if files.kind == "folder":
        return FolderReader(files, columns, spec.caption)
    if files.kind == "parquet":
        return ParquetReader(files, columns)
    return (
        CsvReader(files, columns)
        if files.kind == "csv"
        else TarReader(files, columns, spec.caption)
    )
