"""Tables that are text: CSV and TSV, JSON lines and JSON lists, each gzipped or not.

They are read as their standards say. What could mean two things is refused rather than guessed at,
and named by the line in which an editor shows it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

from ..basics.errors import DataError, told_by
from ..basics.files import refuse_pointer
from .cells import ImageCells, load_beside
from .files import SourceFiles
from .left_out import LeftOut
from .rows import Images, Place, Row, check_columns, describe, in_lists

MAX_LINE = 2**20  # bytes of a line, characters of an entry of a JSON list
CHUNK = 2**16  # characters of a JSON list that are read at once
SWALLOWED = "quoted cells over lines that look like rows"
_AS_TEXT = "images written out as text are not read: give paths, or bytes in parquet or tars"


class TextTable:
    """Files of one form, ``csv``, ``jsonl`` or ``json``; every image is a file, named relative to
    the folder of its table.

    Entries of JSON that are plain texts count as rows with the one column ``plain``.
    """

    def __init__(self, files: SourceFiles, images: ImageCells, plain: str | None = None) -> None:
        self.files = files
        self.cells = images
        self.images = images.names
        self.plain = plain

    def columns(self) -> list[str]:
        if self.files.kind == "csv":
            return next(_delimited(self.files, 0, LeftOut()), ("", []))[1]
        return next((list(values) for _, values in self._parsed(0, LeftOut())), [])

    def rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[list[Row]]:
        """With the values of all columns, these or others."""
        yield from in_lists(self._rows(file, columns, left_out))

    def _rows(self, file: int, columns: Sequence[str], left_out: LeftOut) -> Iterator[Row]:
        wanted = dict.fromkeys([*columns, *self.cells.columns])
        numbers = count()
        for where, values in self._parsed(file, left_out):
            if not wanted.keys() <= values.keys():
                at = "" if self.files.kind == "csv" else where
                key = "prompts.column" if self.plain else "prepare.source"
                check_columns(
                    list(wanted), list(values), describe(self.files, file, at).strip(), key
                )
            for at, own in self.cells.each(values, columns, self.files, file, where):
                paths = self.cells.paths(own, self.files, file, at)
                yield Row(0, next(numbers), own, paths, where=at)

    def load(self, file: int, group: int, places: Sequence[Place]) -> Iterator[Images]:
        yield from load_beside(self.files, file, places)

    def _parsed(self, file: int, left_out: LeftOut) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where each row is, and its values by column."""
        if self.files.kind == "csv":
            records = _delimited(self.files, file, left_out)
            _, header = next(records, ("", []))
            for where, cells in records:
                yield where, dict(zip(header, cells, strict=True))
            return
        read = _json_lines if self.files.kind == "jsonl" else _json_list
        for where, entry in read(self.files, file):
            if self.plain and isinstance(entry, str):
                entry = {self.plain: entry}
            if not isinstance(entry, dict):
                told = f"is {json.dumps(entry)[:40]}, not an object with columns"
                raise _wrong(self.files, file, where, told, "wrong-type")
            yield where, entry


def text_lines(files: SourceFiles, file: int) -> Iterator[str]:
    """The lines of a file with their ends, which are where an editor shows them: LF, CR LF or CR,
    but not U+2028 or a form feed.
    """
    with _opened(files.paths[file]) as source:
        number = 0
        while line := source.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                told = f"is longer than {MAX_LINE >> 20} MiB ({_AS_TEXT})"
                raise _wrong(files, file, f"line {number}", told, "too-large")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _no_text(files, file, f"line {number}, byte {error.start + 1}") from None
            if "\0" in text:
                raise _no_text(files, file, f"line {number}, a zero byte")
            yield from filter(None, _LONE_CR.split(text)) if "\r" in text[:-2] else (text,)


_LONE_CR = re.compile("(?<=\r)(?!\n)")


# CSV


def _delimited(files: SourceFiles, file: int, left_out: LeftOut) -> Iterator[tuple[str, list[str]]]:
    """Where each record begins, and its cells; that of the columns' names comes first."""
    kept: list[str] = []  # the lines of a record

    def lines() -> Iterator[str]:
        for line in text_lines(files, file):
            kept.append(line)
            yield line

    source = lines()
    first = next((line for line in source if line.strip()), "")
    before, width, name = len(kept) - 1, 0, files.name(file)
    delimiter = _delimiter(files, file, first)
    records = csv.reader(
        chain([first], source), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    kept[:] = [first]
    while True:
        start = before + records.line_num + 1
        where = f"line {start}"
        try:
            cells = next(records, None)
        except csv.Error as error:
            raise _broken(files, file, where, before + records.line_num, error) from None
        if cells is None:
            return
        text = kept.copy()
        kept.clear()
        if not cells or (cells == [""] and width != 1):
            continue  # a blank line
        if not width:
            width = len(cells)
            if twice := [cell for cell in dict.fromkeys(cells) if cell and cells.count(cell) > 1]:
                told = f"names the column {twice[0][:60]} twice"
                raise _wrong(files, file, where, told, "duplicate")
        if len(cells) != width:
            told = (
                f"has {len(cells)} cells where the first line has {width}: a cell with "
                f"{delimiter!r} in it stands in quotes, and a quote in those is doubled"
            )
            raise _wrong(files, file, where, told, "mismatch")
        if any('\\"' in line for line in text):
            _check_backslashes(files, file, where, cells, "".join(text))
        if len(text) > 1 and _looks_like_rows(cells, delimiter, width):
            left_out.remark(name, where, SWALLOWED, detail=f"{len(text)} lines")
        yield where, cells


def _delimiter(files: SourceFiles, file: int, first: str) -> str:
    """The one of comma, semicolon and tab that stands between the names of the columns."""
    bare = re.sub(r'"[^"]*("|$)', "", first)
    found = [mark for mark in ",;\t" if mark in bare]
    if "\t" in found and ".tsv" in files.paths[file].name.lower():
        return "\t"
    if len(found) > 1:
        told = (
            f"has {' and '.join(map(repr, found))} between the names of its columns, which may "
            "each be the delimiter: put names that have one in quotes"
        )
        raise _wrong(files, file, "line 1", told, "ambiguous")
    return found[0] if found else ","


def _check_backslashes(
    files: SourceFiles, file: int, where: str, cells: list[str], text: str
) -> None:
    """In a quoted cell a quote is doubled, also one behind a backslash."""
    if sum(cell.count('\\"') for cell in cells) != text.count('\\""'):
        told = 'has \\" outside of quotes: quote the cell, and double the quote'
        raise _wrong(files, file, where, told, "ambiguous")


def _looks_like_rows(cells: list[str], delimiter: str, width: int) -> bool:
    """Whether a quote that was left open may have swallowed rows: a later line of some cell has as
    many delimiters as a row.
    """
    later = (line for cell in cells for line in cell.split("\n")[1:])
    return any(line.count(delimiter) >= width - 1 for line in later)


def _broken(files: SourceFiles, file: int, where: str, last: int, error: csv.Error) -> DataError:
    if "field limit" in str(error):
        told = f"has a cell of over {csv.field_size_limit()} characters: a quote that is never "
        return _wrong(files, file, where, f"{told}closed? ({_AS_TEXT})", "too-large")
    if "end of data" in str(error):
        told = "opens a quote that is never closed"
        return _wrong(files, file, where, told, "damaged")
    told = f"goes on behind a closing quote, in line {last}: a quote in a quoted cell is doubled "
    return _wrong(files, file, where, f'{told}(""), or one is not closed', "damaged")


# JSON


def _json_lines(files: SourceFiles, file: int) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text_lines(files, file), start=1):
        if line.strip():
            where = f"line {number}"
            try:
                yield where, _DECODER.decode(line)
            except (ValueError, RecursionError) as error:
                raise _no_json(files, file, where, error) from None


def _json_list(files: SourceFiles, file: int) -> Iterator[tuple[str, Any]]:
    """The entries of a list, of which only some are in memory."""
    with _opened(files.paths[file]) as binary:
        text = _Stream(io.TextIOWrapper(binary, "utf-8-sig", newline="\n"))
        try:
            if text.peek() != "[":
                raise _wrong(files, file, "line 1", "is not the start of a JSON list", "wrong-type")
            count = 0
            while text.take() != "]":
                if count == 0 and text.peek() == "]":
                    continue
                text.peek()
                count += 1
                where = f"entry {count} (line {text.line})"
                try:
                    yield where, text.value()
                except UnicodeDecodeError:
                    raise
                except (ValueError, RecursionError) as error:
                    raise _no_json(files, file, where, error) from None
                if text.peek() not in (",", "]"):
                    told = "is followed by neither a comma nor the end of the list"
                    raise _wrong(files, file, where, told, "damaged")
            if text.peek():
                told = "goes on behind the end of the list"
                raise _wrong(files, file, f"line {text.line}", told, "damaged")
        except UnicodeDecodeError:
            raise _no_text(files, file, f"behind line {text.line}") from None


class _Stream:
    """Text that is read as its values are asked for."""

    def __init__(self, source: io.TextIOWrapper) -> None:
        self.source = source
        self.text, self.at, self.line = "", 0, 1

    def peek(self) -> str:
        """The next character that is not blank, or nothing at the end."""
        while True:
            found = _BLANK.match(self.text, self.at)
            assert found
            self.line += self.text.count("\n", self.at, found.end())
            self.at = found.end()
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self) -> str:
        """That character, which is passed."""
        found = self.peek()
        self.at += 1
        return found

    def value(self) -> Any:
        """The next value; ValueError for what is none."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                break
            except ValueError as error:
                if len(self.text) - self.at > MAX_LINE:
                    raise ValueError(f"{told_by(error)}, or over {MAX_LINE} characters") from None
                if not self._more():
                    raise
        self.line += self.text.count("\n", self.at, end)
        self.at = end
        return value

    def _more(self) -> bool:
        more = self.source.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice[:60]!r} comes up twice in an object")
    return found


_BLANK = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_each_once)


def _no_json(files: SourceFiles, file: int, where: str, error: Exception) -> DataError:
    return _wrong(files, file, where, f"is not JSON: {told_by(error)}", "damaged")


# Files


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file, unpacked if it is gzipped."""
    refuse_pointer(path)
    try:
        packed = path.suffix.lower() == ".gz"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (OSError, EOFError, zlib.error) as error:
        told = f"{path}: cannot be read: {told_by(error)}"
        raise DataError(told, str(path), "unreadable") from None


def _wrong(files: SourceFiles, file: int, where: str, told: str, kind: str) -> DataError:
    where = describe(files, file, where)
    return DataError(f"{where}: {told}", where, kind)


def _no_text(files: SourceFiles, file: int, where: str) -> DataError:
    path = files.paths[file]
    return DataError(f"{path}: is not UTF-8 text ({where})", str(path), "unreadable")
