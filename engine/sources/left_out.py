"""What is not used of other people's data, and why: counted by reason, and named in a CSV file.

Of a row, a file or a member of a tar one of three things is told: it was *left out*, being a row
that is not used; it was *passed over*, being no row at all; or it is *used*, though not as it
stands. Rows that are used and rows that are left out are all the rows there are.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..basics.errors import redact
from ..basics.files import NewFile, replacing

NAME = "left_out.csv"
COLUMNS = ("file", "where", "column", "fate", "reason", "detail")
MAX_CELL = 1000  # characters: a stranger's name may have any number
ROW, BESIDE, REMARK = "left out", "passed over", "used"


class LeftOut:
    """Takes note of everything that is not used as it stands.

    ``rows``, ``beside`` and ``remarks`` count by reason. Lines go to ``file`` in the order in which
    things are noted, or nowhere; none is kept in memory.
    """

    def __init__(self, file: BinaryIO | NewFile | None = None) -> None:
        self.rows: Counter[str] = Counter()
        self.beside: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.file = file
        self._counter = {ROW: self.rows, BESIDE: self.beside, REMARK: self.remarks}
        self._lines = csv.writer(_AsText(file), lineterminator="\n") if file else None

    def leave_out(
        self, file: str, where: str, reason: str, column: str = "", detail: object = ""
    ) -> None:
        """A row is not used. ``where`` says which it is: ``line 3``, ``row 17``, ``key 0004``."""
        self._note(ROW, file, where, reason, column, detail)

    def pass_over(
        self, file: str, where: str, reason: str, column: str = "", detail: object = ""
    ) -> None:
        """A file, a member or a line is no row, nor part of one."""
        self._note(BESIDE, file, where, reason, column, detail)

    def remark(
        self, file: str, where: str, reason: str, column: str = "", detail: object = ""
    ) -> None:
        """A row is used, but of it there is something to say."""
        self._note(REMARK, file, where, reason, column, detail)

    def copy(self, lines: Iterable[str]) -> None:
        """Note what another one has noted: the lines of its file, without that of the names."""
        for file, where, column, fate, reason, detail in csv.reader(lines):
            self._note(fate, file, where, reason, column, detail)

    @property
    def counts(self) -> dict[str, int]:
        """By reason, whatever was noted: rows first, in the order in which reasons came up."""
        return {**self.rows, **self.beside, **self.remarks}

    def _note(
        self, fate: str, file: str, where: str, reason: str, column: str, detail: object
    ) -> None:
        self._counter[fate][reason] += 1
        if self._lines:
            cells = (file, where, column, fate, reason, detail)
            self._lines.writerow([_on_one_line(str(cell)) for cell in cells])


class KeptLeftOut(LeftOut):
    """One that keeps its lines in memory: for prompts, which are in memory themselves."""

    def __init__(self) -> None:
        self._kept = io.BytesIO()
        super().__init__(self._kept)

    def lines(self) -> list[str]:
        """What :meth:`LeftOut.copy` takes."""
        return self._kept.getvalue().decode().splitlines()


@contextmanager
def naming(path: Path) -> Iterator[LeftOut]:
    """What is noted in the block, in a new file ``path`` with a line of the columns' names."""
    with replacing(path) as file:
        file.write((",".join(COLUMNS) + "\n").encode())
        yield LeftOut(file)


class _AsText:
    """A binary file as `csv` wants it; half a character, which UTF-8 has no bytes for, escaped."""

    def __init__(self, file: BinaryIO | NewFile) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode("utf-8", "backslashreplace"))


def _on_one_line(text: str) -> str:
    """Whatever strangers call their files, a line of ours is one line, without secrets."""
    text = redact(text)
    if len(text) > MAX_CELL:
        text = text[: MAX_CELL - 1] + "…"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
