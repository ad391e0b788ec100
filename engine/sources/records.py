"""From rows to records: which rows state a preference or a rank, and why the others do not."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..basics.errors import DataError
from ..basics.prompt_identity import identity_of
from ..recipe import Imported, Paired, Ranked
from ..recipe.prompts import MAX_PROMPT_CHARACTERS, lone_surrogate
from .left_out import LeftOut
from .rows import Row

TIE, UNLABELLED, CONTRADICTORY = "ties", "without a label", "label contradicts best_image"
MAX_ID = 256  # characters
_WORDS = {"": False, "false": False, "0": False, "0.0": False, "nan": False}
_WORDS |= {"true": True, "1": True, "1.0": True}
ONE_IMAGE = "winner and loser have one id or path"
NO_CAPTION, HELD_OUT = f"no caption of 1 to {MAX_PROMPT_CHARACTERS} characters", "held-out prompt"


@dataclass(frozen=True, slots=True)
class Record:
    """A row worth reading images of.

    ``names`` are the images' ids or paths, empty where the source has neither; ``winner`` is the
    place of the better one (0 for ranked images); ``scores`` are given ones, NaN where a row lacks
    one, empty where the reward is to score.
    """

    row: Row
    caption: str
    winner: int
    names: tuple[str, ...]
    scores: tuple[float, ...]


class RecordMaker:
    """Reads rows as a recipe says."""

    def __init__(self, spec: Imported, present: Collection[str], heldout: Collection[str]) -> None:
        """``present`` are the source's columns: those that are optional are used if they are there.

        Raises DataError for a label that is asked for and not there, as for any other column.
        """
        self.spec = spec
        self.heldout = frozenset(map(identity_of, heldout))
        self.label, self.judged, self.best, self.ids = None, None, None, None
        self.scores: tuple[str, ...] = ()
        self.sign = 1
        if isinstance(spec, Paired | Ranked) and spec.order == "lower":
            self.sign = -1
        if isinstance(spec, Paired):
            self.label = spec.label
            self.judged = spec.has_label if spec.label and spec.has_label in present else None
            self.scores = spec.scores or ()
            if spec.image_ids and set(spec.image_ids) <= set(present):
                self.ids = spec.image_ids
                self.best = spec.best_image if spec.best_image in present else None
        elif isinstance(spec, Ranked) and spec.score:
            self.scores = (spec.score,)

    @property
    def columns(self) -> list[str]:
        """The columns to read, besides the images; each of them must be there."""
        optional = (self.label, self.judged, self.best, *(self.ids or ()), *self.scores)
        return list(dict.fromkeys([self.spec.caption, *filter(None, optional)]))

    def make(self, row: Row, where: str, file: str, left_out: LeftOut) -> Record | None:
        """The record of a row of ``file``, or None for one that is noted in ``left_out``.

        DataError names ``where``.
        """
        caption = row.values[self.spec.caption]
        caption = caption.strip() if isinstance(caption, str) else ""
        identity = identity_of(caption)
        winner: int | str | None = 0
        if not identity or len(caption) > MAX_PROMPT_CHARACTERS or lone_surrogate(caption):
            winner = NO_CAPTION
        elif identity in self.heldout:
            winner = HELD_OUT
        elif self.label:
            winner = self._winner(row, where)
        names = self._names(row)
        if isinstance(winner, int) and len(set(names)) < len(names):
            winner = ONE_IMAGE
        if isinstance(winner, str):
            left_out.leave_out(file, row.where, winner, self._column(winner), caption)
            return None
        assert winner is not None
        return Record(row, caption, winner, names, self._scores(row, where))

    def _column(self, reason: str) -> str:
        """The column that a row is left out for."""
        named = {TIE: self.label, UNLABELLED: self.judged or self.label, CONTRADICTORY: self.best}
        named[ONE_IMAGE] = ", ".join(self.ids or ())
        return named.get(reason, self.spec.caption) or ""

    def _winner(self, row: Row, where: str) -> int | str:
        """The place of the better image, or why there is none."""
        assert self.label
        if self.judged and not _truth(row.values[self.judged], where, self.judged):
            return UNLABELLED
        label = _label(row.values[self.label], where, self.label)
        if math.isnan(label):
            return UNLABELLED
        if label not in (0, 0.5, 1):
            raise DataError(
                f"{where}: {self.label} is {label:g}; it must be 1 (the first image won), 0 (it "
                "lost) or 0.5 (a tie)",
                self.label,
                "out-of-range",
            )
        if label == 0.5:
            return TIE
        winner = int(label == 0)
        if self.best and self.ids:
            best, ids = row.values[self.best], [row.values[name] for name in self.ids]
            if best in ids and ids[winner] != best:
                return CONTRADICTORY
        return winner

    def _names(self, row: Row) -> tuple[str, ...]:
        if self.ids and all(row.values[name] for name in self.ids):
            ids = [str(row.values[name]) for name in self.ids]
            names = tuple(name[:MAX_ID].encode(errors="replace").decode() for name in ids)
            if len(set(names)) == len(set(ids)):
                return names  # else they differ in what a record has no room for
        return row.paths if all(row.paths) else ()

    def _scores(self, row: Row, where: str) -> tuple[float, ...]:
        """Given scores, so that the higher one is better."""
        return tuple(self.sign * _number(row.values[name], where, name) for name in self.scores)


def _label(value: Any, where: str, column: str) -> float:
    """How the first image did, 1, 0.5 or 0, NaN if nobody says; of a list the higher number won."""
    if not isinstance(value, list):
        return _number(value, where, column)
    if len(value) != 2:
        told = f"{where}: {column} holds {len(value)} numbers, one for each of two images is wanted"
        raise DataError(told, column, "mismatch")
    first, second = (_number(each, where, column) for each in value)
    if math.isnan(first + second):
        return math.nan
    return 0.5 if first == second else float(first > second)


def _number(value: Any, where: str, column: str) -> float:
    """A cell as a number, NaN for an empty one; numbers may come as text, as CSV has them."""
    if value is None or value == "":
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(
            f"{where}: {column} is {str(value)[:60]!r}, not a number", column, "wrong-type"
        ) from None


def _truth(value: Any, where: str, column: str) -> bool:
    """A cell as true or false, false for an empty one; as text, as CSV has it, or as a number."""
    word = "" if value is None else str(value).strip().lower()
    if word not in _WORDS:
        told = f"{where}: {column} is {str(value)[:60]!r}, neither true nor false"
        raise DataError(told, column, "wrong-type")
    return _WORDS[word]
