"""The terminal of all three verbs: a normal run fits on one screen.

On a TTY progress is one live line; in cluster logs and CI it is a plain line now and then. Texts
are printed as they are: no markup, so a prompt such as ``[red]`` is shown and not interpreted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .progress import Field, Progress, ProgressBar, plain_line

_LOG_WIDTH = 120  # rich assumes 80 columns where it cannot ask, and would fold tables in logs


class Terminal:
    """Prints for rank 0; with ``enabled=False`` (all other ranks) every method is silent.

    ``interval`` is the least number of seconds between two progress lines when stdout is not a
    TTY. ``live`` forces the live bar on or off; the default looks at stdout.
    """

    def __init__(
        self,
        enabled: bool = True,
        interval: float = 30.0,
        *,
        live: bool | None = None,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.enabled = enabled
        self.interval = interval
        self._clock = clock
        self._warned: set[str] = set()
        _never_fail_to_encode(stdout or sys.stdout, stderr or sys.stderr)
        self._out = _console(stdout, stderr=False)
        self._err = _console(stderr, stderr=True)
        self.live = _is_interactive(self._out) if live is None else live

    def header(self, title: str, rows: Sequence[tuple[str, str]] = ()) -> None:
        """A bold title and, beneath it, aligned ``name  value`` rows."""
        self._print(self._out, Text(title, "bold"))
        width = max((len(name) for name, _ in rows), default=0)
        for name, value in rows:
            self._print(self._out, Text.assemble("  ", (name.ljust(width), "dim"), "  ", value))

    def line(self, text: str = "") -> None:
        """A line of text; above the live bar if there is one."""
        self._print(self._out, Text(text))

    def warn(self, text: str) -> None:
        """A warning on stderr; the same text is printed once only."""
        if text not in self._warned:
            self._warned.add(text)
            self._print(self._err, Text.assemble(("warning: ", "bold yellow"), text))

    def error(self, text: str) -> None:
        """An error on stderr, as one line without a traceback."""
        self._print(self._err, Text.assemble(("error: ", "bold red"), text))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; columns that hold numbers are aligned to the right."""
        if not self.enabled:
            return
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            header_style="dim",
        )
        for index, name in enumerate(columns):
            numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
            table.add_column(Text(name), justify="right" if numeric else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._print(self._out, Text(title, "bold"))
        self._out.print(table)

    @contextmanager
    def progress(
        self, label: str, total: int, done: int = 0, unit: str = "images"
    ) -> Iterator[Progress]:
        """Progress of ``total`` units of which ``done`` were finished before (a resumed run).

        The rate and the ETA count only what is done inside the context.
        """
        progress = Progress(label, total, done, unit, clock=self._clock)
        if not self.enabled:
            yield progress
        elif self.live:
            bar = ProgressBar(progress, ascii_only=not _is_unicode(self._out))
            with Live(bar, console=self._out, refresh_per_second=4):
                yield progress
                progress.finished = True
        else:
            with self._plain_progress(progress):
                yield progress

    @contextmanager
    def _plain_progress(self, progress: Progress) -> Iterator[None]:
        last_time, last_done = self._clock(), -1

        def show_if_due() -> None:
            nonlocal last_time, last_done
            if self._clock() - last_time >= self.interval:
                last_time, last_done = self._clock(), progress.done
                self.line(plain_line(progress))

        progress.on_advance = show_if_due
        try:
            yield
            progress.finished = True
        finally:
            if progress.finished or progress.done != last_done:
                self.line(plain_line(progress))

    def _print(self, console: Console, text: Text) -> None:
        if self.enabled:
            # soft_wrap: a path or message stays one line, to be copied or grepped.
            console.print(text, soft_wrap=True)


def _console(file: IO[str] | None, stderr: bool) -> Console:
    stream = file or (sys.stderr if stderr else sys.stdout)
    known_width = stream.isatty() or "COLUMNS" in os.environ
    return Console(
        file=file,
        stderr=stderr,
        markup=False,
        emoji=False,
        highlight=False,
        width=None if known_width else _LOG_WIDTH,
    )


def _never_fail_to_encode(*streams: IO[str]) -> None:
    """A log in ASCII must not end a run because a prompt has an accent."""
    for stream in streams:
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def _is_interactive(console: Console) -> bool:
    # rich alone would answer yes under FORCE_COLOR, and fill CI logs with cursor movements.
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


def _is_unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _is_number(cell: str) -> bool:
    return cell.lstrip("+-−±~<>[").strip()[:1].isdigit() or cell in ("", "–", "-", "n/a", "nan")


__all__ = ["Field", "Progress", "Terminal"]
