"""The prompts of a recipe: read or filled in, each once, and divided into those that are trained
on, those that are held out, and those that training is validated on.

A file of prompts has one a line, or is a table (parquet, CSV, TSV, JSONL) with a column of them, or
a JSON list of texts or of objects that have the column.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

from ..basics import keyed
from ..basics.errors import DataError
from ..basics.keyed import Stream, content_id
from ..basics.prompt_identity import identity_of
from ..basics.shipped import locate
from ..recipe import Prompts, Recipe, Split, Templates
from ..recipe.prompts import MAX_PROMPT_CHARACTERS, lone_surrogate, names_in, template_parts
from .cells import ImageCells
from .files import Kind, SourceFiles, kind_of, refuse_url
from .left_out import LeftOut
from .rows import RowReader, check_columns
from .text_tables import TextTable, text_lines

COLUMN = "prompts.column"
COMMENT, BLANK = "comments in prompt files", "blank lines in prompt files"
EMPTY, REPEATED = "cells without a prompt", "repeated prompts"


Placed = tuple[str, str]
"""Where a prompt stands in its file, and the prompt."""


def prompts_in(path: str, column: str, left_out: LeftOut) -> Iterator[Placed]:
    """The prompts of a file in their order, each once; tables are read in a stream.

    Comments, blank lines, empty cells and what comes up again are noted in ``left_out``. DataError
    names file, line or row, and column.
    """
    refuse_url(f"prompts: {path}", path, path)
    path = locate(path)
    place = Path(path)
    kind = kind_of(place)
    if place.suffix.lower() in (".yaml", ".yml") or kind == "tar":
        raise DataError(
            f"prompts: {path} is {'YAML' if kind is None else 'a tar'}, which prompts are not read "
            "from: give a file with a prompt a line, a table, or templates in the recipe",
            path,
            "unsupported",
        )
    seen: set[str] = set()
    try:
        for where, cell in _cells(place, kind, column, left_out):
            prompt = _prompt(cell, f"{place} {where}" + (f", column {column}" if kind else ""))
            if not prompt and kind:
                left_out.leave_out(path, where, EMPTY, column)
            elif not prompt:
                left_out.pass_over(path, where, BLANK)
            elif prompt in seen:
                left_out.leave_out(path, where, REPEATED, column if kind else "", prompt)
            else:
                seen.add(prompt)
                yield where, prompt
    except DataError as error:
        missing = (error.kind, error.key) == ("missing", column)
        key = COLUMN if missing else error.key
        raise DataError(f"prompts: {error}", key, error.kind) from None


def _prompt(cell: Any, where: str) -> str:
    """The prompt in a line or a cell, empty if there is none."""
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise DataError(f"{where} holds {type(cell).__name__}, not text", where, "wrong-type")
    prompt = cell.strip()
    if half := lone_surrogate(prompt):
        raise DataError(f"{where} holds half a character, {half!r}: remove it", where, "damaged")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise DataError(
            f"{where} has {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are taken",
            where,
            "too-large",
        )
    return prompt


def _cells(
    path: Path, kind: Kind | None, column: str, left_out: LeftOut
) -> Iterator[tuple[str, Any]]:
    """Where each line that is no comment is, or each row of a table, and what it holds."""
    files = SourceFiles(kind or "folder", path.parent, (path,))
    if kind is None:
        for number, line in enumerate(text_lines(files, 0), start=1):
            where = f"line {number}"
            if line.lstrip().startswith("#"):
                left_out.pass_over(str(path), where, COMMENT, detail=line.strip())
            else:
                yield where, line
        return
    no_images = ImageCells(())
    reader: RowReader
    if kind == "parquet":
        # Here: training loads no pyarrow, which is as large as all else that a GPU is brought.
        from .parquet import ParquetReader

        reader = ParquetReader(files, no_images)
    else:
        reader = TextTable(files, no_images, plain=column)
    check_columns([column], reader.columns() or [column], str(path), COLUMN)
    for rows in reader.rows(0, [column], left_out):
        yield from ((row.where, row.values[column]) for row in rows)


OTHER_SPELLING = "another spelling of an earlier prompt"
# Splits in their order, each with a draw of its own: the second moves no prompt of the first.
SPLIT_OFF = {"heldout": Stream.PROMPT_SPLIT, "validation": Stream.VALIDATION_SPLIT}
WHY_APART = {
    ("train", "heldout"): "held-out prompts must not be trained on",
    ("train", "validation"): "prompts that training is validated on must not be trained on",
    ("heldout", "validation"): "what chooses a checkpoint must not report on it",
}
MAX_FILLED_IN = 1_000_000  # prompts of templates: lists multiply, and a slip is soon a billion


class PromptSets(NamedTuple):
    """The prompts of a recipe, no two of them alike; empty what it does not name."""

    train: list[str]
    heldout: list[str]
    validation: list[str]


def read_prompts(spec: Prompts, seed: int, left_out: LeftOut | None = None) -> PromptSets:
    """The prompts of a recipe.

    What of their files is no prompt is noted in ``left_out``.

    DataError names the file and line, or row and column, at fault.
    """
    left_out = left_out or LeftOut()
    sets = {side: _read(spec, side, left_out) for side in PromptSets._fields}
    for side, stream in SPLIT_OFF.items():
        if isinstance(split := getattr(spec, side), Split):
            key = f"prompts.{side}"
            sets["train"], sets[side] = _divided(sets["train"], split, key, stream, seed)
    sets = {side: prompts[: spec.limit] for side, prompts in sets.items()}
    _refuse_shared(spec, sets)
    return PromptSets(**sets)


def sample_prompts(recipe: Recipe) -> list[str]:
    """Those that training draws pictures of: of training prompts, then of held-out ones."""
    if not recipe.train.sample_every:
        return []
    sets, count = read_prompts(recipe.prompts, recipe.seed), recipe.train.sample_prompts
    return [*sets.train[:count], *sets.heldout[:count]]


def evaluation_prompts(recipe: Recipe) -> list[str]:
    """Those that training is validated on."""
    if not recipe.evaluate.every:
        return []
    return read_prompts(recipe.prompts, recipe.seed).validation[: recipe.evaluate.prompts]


def _refuse_shared(spec: Prompts, sets: dict[str, list[str]]) -> None:
    """DataError if two of the sets have a prompt in common, in whatever spelling."""
    known = {side: {identity_of(prompt): prompt for prompt in own} for side, own in sets.items()}
    for one, other in combinations(known, 2):
        both = known[one].keys() & known[other].keys()
        if both:
            first, same = min((known[other][identity], known[one][identity]) for identity in both)
            shown = repr(first) if first == same else f"{first!r}, there {same!r}"
            raise DataError(
                f"{_named(spec, other)} shares {len(both)} prompts with {_named(spec, one)}, e.g. "
                f"{shown}: {WHY_APART[one, other]}",
                f"prompts.{other}",
                "duplicate",
            )


def _read(spec: Prompts, side: str, left_out: LeftOut) -> list[str]:
    """The prompts of one side in their order, each once: as it is spelled first."""
    value, key = getattr(spec, side), f"prompts.{side}"
    if isinstance(value, str):
        place, texts = value, prompts_in(value, spec.column, left_out)
    elif isinstance(value, Templates):
        place, texts = key, _filled_in(value, spec.column, key, left_out)
    else:
        return []
    first: dict[str, str] = {}
    for where, text in texts:
        identity = identity_of(text)
        if identity and first.setdefault(identity, text) != text:
            detail = f"{text!r}, earlier {first[identity]!r}"
            left_out.leave_out(place, where, OTHER_SPELLING, detail=detail)
    return _some(first.values(), key, f"prompts: {place} holds no prompt")


def _some(texts: Iterable[str], key: str, otherwise: str) -> list[str]:
    """The texts, each once; DataError saying ``otherwise`` of ``key`` where there is none."""
    found = list(dict.fromkeys(texts))
    if not found:
        raise DataError(otherwise, key, "empty")
    return found


def _filled_in(spec: Templates, column: str, key: str, left_out: LeftOut) -> Iterator[Placed]:
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
        where = f"template {template!r}"
        yield from ((where, prompt) for prompt in _products(template, lists, key))


def _entries(value: str | Sequence[str], column: str, key: str, left_out: LeftOut) -> list[str]:
    if isinstance(value, str):
        entries = (entry for _, entry in prompts_in(value, column, left_out))
        return _some(entries, key, f"{key}: {value} holds no entry")
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


def _divided(
    prompts: list[str], split: Split, key: str, stream: Stream, seed: int
) -> tuple[list[str], list[str]]:
    """Both sides in the order of the prompts, whose draws have nothing to do with one another."""
    keys = keyed.make_keys(seed, stream, [content_id(prompt) for prompt in prompts])
    draws = dict(zip(prompts, keyed.uniform(keys).tolist(), strict=True))
    if split.count is not None:
        lowest = sorted(prompts, key=lambda prompt: (draws[prompt], prompt))
        out, key, shown = set(lowest[: split.count]), f"{key}.count", str(split.count)
    else:
        assert split.fraction is not None
        out = {prompt for prompt in prompts if draws[prompt] < split.fraction}
        key, shown = f"{key}.fraction", f"{split.fraction:g}"
    if not 0 < len(out) < len(prompts):
        raise DataError(
            f"{key}={shown} holds out {len(out)} of {len(prompts)} prompts; both sides need "
            "one: change it, or the seed",
            key,
            "empty",
        )
    trained = [prompt for prompt in prompts if prompt not in out]
    return trained, [prompt for prompt in prompts if prompt in out]


def _named(spec: Prompts, side: str) -> str:
    value = getattr(spec, side)
    if side == "train" and isinstance(value, str):
        return value
    return f"prompts.{side}={value}" if isinstance(value, str) else f"prompts.{side}"
