"""Preference data that is already there: read in a stream, row by row, from tables, tars, folders.

`files` finds it; `parquet`, `text_tables`, `tars` and `folders` read rows, and `cells` finds images
in tables; `records` decides which rows say something, `index` keeps those on disk, `pictures`
brings their images. `left_out` takes note of all else. `prompts` reads prompts of the same tables.
"""

from __future__ import annotations

from ..basics.errors import DataError
from ..recipe import Imported, Paired, Ranked
from .cells import ImageCells
from .files import SourceFiles, find_files
from .folders import FolderReader
from .rows import RowReader
from .tars import TarReader
from .text_tables import TextTable

__all__ = ["SourceFiles", "find_files", "image_columns", "open_source"]


def image_columns(spec: Imported) -> ImageCells:
    """Where the images of a row are: those of a pair, or the one of a ranked image."""
    if isinstance(spec, Paired):
        return ImageCells.of(spec.images)
    assert isinstance(spec, Ranked)
    return ImageCells.of((spec.image,))


def open_source(spec: Imported) -> RowReader:
    """The reader of a recipe's data set; DataError if there is none, or none that can be read."""
    cells = image_columns(spec)
    files = find_files(spec.path, cells.names if isinstance(spec, Paired) else None)
    if files.kind == "parquet":
        from .parquet import ParquetReader  # here: see prompts.py

        return ParquetReader(files, cells)
    if files.kind not in ("folder", "tar"):
        return TextTable(files, cells)
    if cells.listed:
        told = f"prepare.source.images={cells.listed}: a {files.kind} has no lists: name two"
        raise DataError(told, "prepare.source.images", "unsupported")
    if files.kind == "folder":
        return FolderReader(files, cells.names, spec.caption)
    return TarReader(files, cells.names, spec.caption)
