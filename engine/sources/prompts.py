"""The prompts of a recipe: read or filled in, each once, and divided into training and held-out.

A file of prompts has one a line, or is a table (parquet, CSV, TSV, JSONL) with a column of them, or
a JSON list of texts or of objects that have the column.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..basics import keyed
from ..basics.errors import DataError, told_by
from ..basics.files import LFS_REMEDY, is_lfs_pointer
from ..basics.keyed import Stream, content_id
from ..basics.prompt_identity import identity_of
from ..basics.shipped import locate
from ..recipe import Prompts, Split, Templates
from ..recipe.prompts import MAX_PROMPT_CHARACTERS, lone_surrogate, names_in, template_parts
from .files import SourceFiles
from .left_out import LeftOut
from .rows import describe
from .tables import CsvReader, ParquetReader

MAX_LINE_BYTES = 2**20  # of a JSONL file, whose rows hold more than a prompt
MAX_JSON_BYTES = 2**26  # of a JSON list, which is read as a whole


def prompts_in(path: str, column: str, left_out: LeftOut) -> Iterator[str]:
    """The prompts of a file in their order, repeated ones included; tables are read in a stream.

    Blank lines and empty cells are no prompts. DataError names file, line or row, and column.
    """
    path = locate(path)
    if is_lfs_pointer(path):
        raise _unreadable(path, LFS_REMEDY)
    kind = Path(path).suffix.lower()
    if kind == ".jsonl":
        cells = _json_lines(path, column)
    elif kind == ".json":
        cells = _json_list(path, column)
    elif kind in (".parquet", ".csv", ".tsv"):
        cells = _table(path, kind, column, left_out)
    elif kind in (".yaml", ".yml"):
        raise DataError(
            f"prompts: {path} is YAML, whose lists are not read: give a file with a prompt a line, "
            "or JSON, or templates in the recipe",
            path,
            "unsupported",
        )
    else:
        cells = _lines(path)
    for where, cell in cells:
        if cell is None:
            continue
        key = where.removesuffix(",")
        if not isinstance(cell, str):
            raise DataError(
                f"prompts: {where} holds {type(cell).__name__}, not text", key, "wrong-type"
            )
        prompt = cell.strip()
        if half := lone_surrogate(prompt):
            raise DataError(
                f"prompts: {where} holds half a character, {half!r}: remove it", key, "damaged"
            )
        if len(prompt) > MAX_PROMPT_CHARACTERS:
            raise DataError(
                f"prompts: {where} has {len(prompt)} characters; at most "
                f"{MAX_PROMPT_CHARACTERS} are taken",
                key,
                "too-large",
            )
        if prompt:
            yield prompt


def _lines(path: str) -> Iterator[tuple[str, str]]:
    try:
        # Not `splitlines`, which cuts at U+2028 and other characters that are part of a prompt.
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {told_by(error)}") from None
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"is not UTF-8 text (byte {error.start})") from None
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("#"):
            yield f"{path}:{number}", line


def _table(path: str, kind: str, column: str, left_out: LeftOut) -> Iterator[tuple[str, Any]]:
    place = Path(path)
    reader: ParquetReader | CsvReader
    if kind == ".parquet":
        reader = ParquetReader(SourceFiles("parquet", place.parent, (place,)), ())
    else:
        delimiter = "\t" if kind == ".tsv" else ","
        reader = CsvReader(SourceFiles("csv", place.parent, (place,)), (), delimiter)
    try:
        _check_column(path, column, reader.columns())
        for rows in reader.rows(0, [column], left_out):
            for row in rows:
                yield (
                    f"{describe(reader.files, 0, row.where)}, column {column},",
                    row.values[column],
                )
    except DataError as error:
        told = f"prompts: {str(error).removeprefix('prompts: ')}"
        raise DataError(told, error.key, error.kind) from None


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
        raise _unreadable(path, f"cannot be read: {told_by(error)}") from None


def _json_cell(line: bytes, where: str, column: str) -> tuple[str, Any]:
    return _cell(_json(line, where, MAX_LINE_BYTES), where, column)


def _json_list(path: str, column: str) -> Iterator[tuple[str, Any]]:
    """Entries are texts, or objects with the column."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {told_by(error)}") from None
    entries = _json(content, path, MAX_JSON_BYTES)
    if not isinstance(entries, list):
        raise DataError(f"prompts: {path} is no JSON list", path, "wrong-type")
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, entry {number}"
        yield (f"{where},", entry) if isinstance(entry, str) else _cell(entry, where, column)


def _json(text: bytes, where: str, most: int) -> Any:
    if len(text) > most:
        raise DataError(f"prompts: {where} is longer than {most >> 20} MiB", where, "too-large")
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"prompts: {where} is not JSON: {told_by(error)}", where, "damaged"
        ) from None


def _cell(row: Any, where: str, column: str) -> tuple[str, Any]:
    if not isinstance(row, dict):
        raise DataError(
            f"prompts: {where} is not an object such as {{{column!r}: ...}}", where, "wrong-type"
        )
    _check_column(where, column, list(row))
    return f"{where}, column {column},", row[column]


def _check_column(where: str, column: str, present: list[str]) -> None:
    if column not in present:
        raise DataError(
            f"prompts: {where} has no column {column}; it has {', '.join(present) or 'none'}: set "
            "prompts.column to the one that holds the prompts",
            "prompts.column",
            "missing",
        )


def _unreadable(path: str, why: str) -> DataError:
    return DataError(f"prompts: {path} {why}", path, "unreadable")


OTHER_SPELLING = "another spelling of an earlier prompt"
MAX_FILLED_IN = 1_000_000  # prompts of templates: lists multiply, and a slip is soon a billion


def read_prompts(
    spec: Prompts, seed: int, left_out: LeftOut | None = None
) -> tuple[list[str], list[str]]:
    """Training and held-out prompts of a recipe, none where it names none.

    What of their files is no prompt is noted in ``left_out``.

    DataError names the file and line, or row and column, at fault.
    """
    left_out = left_out or LeftOut()
    train, heldout = _read(spec, "train", left_out), _read(spec, "heldout", left_out)
    if isinstance(spec.heldout, Split):
        train, heldout = _divided(train, spec.heldout, seed)
    train, heldout = train[: spec.limit], heldout[: spec.limit]
    trained = {identity_of(prompt): prompt for prompt in train}
    both = sorted(prompt for prompt in heldout if identity_of(prompt) in trained)
    if both:
        first, other = both[0], trained[identity_of(both[0])]
        shown = repr(first) if first == other else f"{first!r}, there {other!r}"
        raise DataError(
            f"{_named(spec, 'heldout')} shares {len(both)} prompts with "
            f"{_named(spec, 'train')}, e.g. {shown}: held-out prompts must not be trained on",
            "prompts.heldout",
            "duplicate",
        )
    return train, heldout


def _read(spec: Prompts, side: str, left_out: LeftOut) -> list[str]:
    """The prompts of `train` or `heldout` in their order, each once: as it is spelled first."""
    value, key = getattr(spec, side), f"prompts.{side}"
    if isinstance(value, str):
        place, texts = value, prompts_in(value, spec.column, left_out)
    elif isinstance(value, Templates):
        place, texts = key, _filled_in(value, spec.column, key, left_out)
    else:
        return []
    first: dict[str, str] = {}
    for text in texts:
        identity = identity_of(text)
        if identity and first.setdefault(identity, text) != text:
            detail = f"{text!r}, earlier {first[identity]!r}"
            left_out.leave_out(place, "", OTHER_SPELLING, detail=detail)
    return _some(first.values(), key, f"prompts: {place} holds no prompt")


def _some(texts: Iterable[str], key: str, otherwise: str) -> list[str]:
    """The texts, each once; DataError saying ``otherwise`` of ``key`` where there is none."""
    found = list(dict.fromkeys(texts))
    if not found:
        raise DataError(otherwise, key, "empty")
    return found


def _filled_in(spec: Templates, column: str, key: str, left_out: LeftOut) -> Iterator[str]:
    lists = {
        name: _entries(value, column, f"{key}.lists.{name}", left_out)
        for name, value in spec.lists.items()
    }
    sizes = {
        template: math.prod(len(lists[name]) for name in names_in(template))
        for template in spec.templates
    }
    if sum(sizes.values()) > MAX_FILLED_IN:
        raise DataError(
            f"{key}: its lists make {sum(sizes.values())} prompts; at most {MAX_FILLED_IN} are "
            "taken: shorten a list",
            key,
            "too-large",
        )
    for template in spec.templates:
        yield from _products(template, lists, key)


def _entries(value: str | Sequence[str], column: str, key: str, left_out: LeftOut) -> list[str]:
    if isinstance(value, str):
        return _some(prompts_in(value, column, left_out), key, f"{key}: {value} holds no entry")
    return _some(filter(None, map(str.strip, value)), key, f"{key}: the list is empty")


def _products(template: str, lists: dict[str, list[str]], key: str) -> Iterator[str]:
    names, parts = names_in(template), template_parts(template)
    for entries in product(*(lists[name] for name in names)):
        chosen = dict(zip(names, entries, strict=True))
        prompt = "".join(text + (chosen[name] if name else "") for text, name in parts).strip()
        if not 0 < len(prompt) <= MAX_PROMPT_CHARACTERS:
            raise DataError(
                f"{key}: template {template!r} makes a prompt of {len(prompt)} characters; 1 to "
                f"{MAX_PROMPT_CHARACTERS} are taken",
                key,
                "out-of-range",
            )
        if half := lone_surrogate(prompt):
            raise DataError(
                f"{key}: template {template!r} makes a prompt with half a character, {half!r}: "
                "remove it",
                key,
                "damaged",
            )
        yield prompt


def _divided(prompts: list[str], split: Split, seed: int) -> tuple[list[str], list[str]]:
    """Both sides in the order of the prompts, whose draws have nothing to do with one another."""
    keys = keyed.make_keys(seed, Stream.PROMPT_SPLIT, [content_id(prompt) for prompt in prompts])
    draws = dict(zip(prompts, keyed.uniform(keys).tolist(), strict=True))
    if split.count is not None:
        lowest = sorted(prompts, key=lambda prompt: (draws[prompt], prompt))
        out = set(lowest[: split.count])
    else:
        assert split.fraction is not None
        out = {prompt for prompt in prompts if draws[prompt] < split.fraction}
    if not 0 < len(out) < len(prompts):
        raise DataError(
            f"{_shown(split)} holds out {len(out)} of {len(prompts)} prompts; both sides need "
            "one: change it, or the seed",
            _key_of(split),
            "empty",
        )
    trained = [prompt for prompt in prompts if prompt not in out]
    return trained, [prompt for prompt in prompts if prompt in out]


def _shown(split: Split) -> str:
    value = f"{split.fraction:g}" if split.fraction is not None else str(split.count)
    return f"{_key_of(split)}={value}"


def _key_of(split: Split) -> str:
    return f"prompts.heldout.{'count' if split.fraction is None else 'fraction'}"


def _named(spec: Prompts, side: str) -> str:
    value = getattr(spec, side)
    if side == "train" and isinstance(value, str):
        return value
    return f"prompts.{side}={value}" if isinstance(value, str) else f"prompts.{side}"
