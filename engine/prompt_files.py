"""Prompts in a file: text with one a line, or a column of a parquet, CSV, TSV or JSONL table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .basics.errors import DataError
from .recipe.prompts import MAX_PROMPT_CHARACTERS, lone_surrogate
from .sources.files import SourceFiles
from .sources.tables import CsvReader, ParquetReader

MAX_LINE_BYTES = 2**20  # of a JSONL file, whose rows hold more than a prompt


def prompts_in(path: str, column: str) -> Iterator[str]:
    """The prompts of a file in their order, repeated ones included; tables are read in a stream.

    Blank lines and empty cells are no prompts. DataError names file, line or row, and column.
    """
    kind = Path(path).suffix.lower()
    if kind == ".jsonl":
        cells = _json_lines(path, column)
    elif kind in (".parquet", ".csv", ".tsv"):
        cells = _table(path, kind, column)
    else:
        cells = _lines(path)
    for where, cell in cells:
        if cell is None:
            continue
        if not isinstance(cell, str):
            raise DataError(f"prompts: {where} holds {type(cell).__name__}, not text")
        prompt = cell.strip()
        if half := lone_surrogate(prompt):
            raise DataError(f"prompts: {where} holds half a character, {half!r}: remove it")
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise DataError(
                f"prompts: {where} has {len(prompt)} characters; at most "
                f"{MAX_PROMPT_CHARACTERS} are taken"
            )
        if prompt:
            yield prompt


def _lines(path: str) -> Iterator[tuple[str, str]]:
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"prompts: {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"prompts: {path} is not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("#"):
            yield f"{path}:{number}", line


def _table(path: str, kind: str, column: str) -> Iterator[tuple[str, Any]]:
    place = Path(path)
    reader: ParquetReader | CsvReader
    if kind == ".parquet":
        reader = ParquetReader(SourceFiles("parquet", place.parent, (place,)), ())
    else:
        delimiter = "\t" if kind == ".tsv" else ","
        reader = CsvReader(SourceFiles("csv", place.parent, (place,)), (), delimiter)
    try:
        _check_column(path, column, reader.columns())
        for rows in reader.rows(0, [column]):
            for row in rows:
                yield f"{reader.describe(0, row.number)}, column {column},", row.values[column]
    except DataError as error:
        raise DataError(f"prompts: {str(error).removeprefix('prompts: ')}") from None


def _json_lines(path: str, column: str) -> Iterator[tuple[str, Any]]:
    """Rows are objects, one a line; a row without the column is an error, one with null is not."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield _json_cell(line, f"{path}:{number}", column)
    except OSError as error:
        raise DataError(f"prompts: {path} cannot be read: {error.strerror}") from None


def _json_cell(line: bytes, where: str, column: str) -> tuple[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"prompts: {where} is longer than {MAX_LINE_BYTES >> 20} MiB")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"prompts: {where} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"prompts: {where} is not an object such as {{{column!r}: ...}}")
    _check_column(where, column, list(row))
    return f"{where}, column {column},", row[column]


def _check_column(where: str, column: str, present: list[str]) -> None:
    if column not in present:
        raise DataError(
            f"prompts: {where} has no column {column}; it has {', '.join(present) or 'none'}: set "
            "prompts.column to the one that holds the prompts"
        )
