"""The terminal of all three verbs: a normal run fits on one screen.

On a TTY progress is one live line; in cluster logs and CI it is a plain line now and then. Texts
are printed as they are: no markup, so a prompt such as ``[red]`` is shown and not interpreted.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..basics.errors import redact

Field = float | int | str | None

_RATE_WINDOW = 60.0  # seconds: long enough to be calm, short enough to forget a slow first step
_SAMPLE_EVERY = 0.2  # seconds between remembered points, so that fast loops cost nothing
_BAR_WIDTH = (8, 30)


class Progress:
    """Counts units; made by :meth:`Terminal.progress`."""

    def __init__(
        self,
        label: str,
        total: int,
        done: int = 0,
        unit: str = "images",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self.fields: dict[str, Field] = {}
        self.finished = False
        self.on_advance: Callable[[], None] | None = None
        self._clock = clock
        self._started, self._done_before = clock(), done
        self._samples = deque([(self._started, done)])

    def advance(self, n: int = 1, **fields: Field) -> None:
        """Count ``n`` more units; ``fields`` (``loss=0.69, stage="2/5"``) are shown until replaced.

        A name that ends in ``_s`` is a rate: ``pairs_s=113`` is shown as ``113 pairs/s``.
        """
        self.done += n
        self.fields.update(fields)
        now = self._clock()
        if now - self._samples[-1][0] >= _SAMPLE_EVERY:
            self._samples.append((now, self.done))
        while len(self._samples) > 2 and now - self._samples[1][0] > _RATE_WINDOW:
            self._samples.popleft()
        if self.on_advance is not None:
            self.on_advance()

    @property
    def elapsed(self) -> float:
        """Seconds since the context was entered."""
        return self._clock() - self._started

    @property
    def rate(self) -> float | None:
        """Units a second, over the last minute (over everything once finished)."""
        then, done = (self._started, self._done_before) if self.finished else self._samples[0]
        seconds = self._clock() - then
        return (self.done - done) / seconds if seconds > 0 and self.done > done else None

    @property
    def eta(self) -> float | None:
        """Seconds that the rest will take at the present rate."""
        rate = self.rate
        return max(0, self.total - self.done) / rate if rate else None


def plain_line(progress: Progress) -> str:
    """The whole state as one line of a log."""
    percent = f"{math.floor(100 * progress.done / progress.total)}%" if progress.total else ""
    parts = [progress.label, _count(progress), percent, *_times(progress), _rate(progress)]
    parts += [format_field(name, value) for name, value in progress.fields.items()]
    return "  ".join(part for part in parts if part)


class ProgressBar:
    """Live rendering of a :class:`Progress` in the width there is; it never wraps."""

    def __init__(self, progress: Progress, ascii_only: bool = False) -> None:
        self.progress = progress
        self._filled, self._empty = ("#", "-") if ascii_only else ("━", "━")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.render(options.max_width)

    def render(self, width: int) -> Text:
        """The line at a terminal width: fields go first, from the right, then rate and times."""
        progress = self.progress
        elapsed, *eta = _times(progress)
        parts = [(_count(progress), "")]
        # By importance; ETA before elapsed so that the narrowest terminal keeps it.
        optional = [(text, "cyan") for text in eta] + [(elapsed, "dim")]
        optional += [(_rate(progress), "")] if _rate(progress) else []
        optional += [(format_field(*field), "dim") for field in progress.fields.items()]
        room = width - 1 - len(progress.label) - 1 - _BAR_WIDTH[0] - 2 - len(parts[0][0])
        for text, style in optional:
            if len(text) + 2 > room:
                break
            room -= len(text) + 2
            parts.append((text, style))
        bar_width = max(0, min(_BAR_WIDTH[1], _BAR_WIDTH[0] + room))
        line = Text(no_wrap=True, overflow="crop", end="")
        line.append(f"{progress.label} ", "bold")
        line.append_text(self._bar(bar_width))
        for text, style in parts:
            line.append("  ").append(text, style)
        return line

    def _bar(self, width: int) -> Text:
        progress = self.progress
        share = min(1.0, progress.done / progress.total) if progress.total else 1.0
        filled = math.floor(share * width)
        color = "green" if share == 1.0 else "cyan"
        return Text.assemble(
            (self._filled * filled, color), (self._empty * (width - filled), "bright_black")
        )


def format_field(name: str, value: Field) -> str:
    """``loss 0.6931``, ``113 pairs/s``, ``lr 5.0e-05``."""
    if isinstance(value, float):
        size = abs(value)
        if math.isfinite(value):
            small = 0 < size < 1e-3
            value = f"{value:.1e}" if small else f"{value:.4f}" if size < 10 else f"{value:.4g}"
    shown = "–" if value is None else str(value)
    if name.endswith("_s"):
        return f"{shown} {name.removesuffix('_s')}/s"
    return f"{name.replace('_', ' ')} {shown}"


def format_duration(seconds: float) -> str:
    """``0:01:20``; days stay in the hours."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _count(progress: Progress) -> str:
    return f"{progress.done}/{progress.total} {progress.unit}"


def _times(progress: Progress) -> list[str]:
    elapsed = format_duration(progress.elapsed)
    if progress.finished or progress.done >= progress.total:
        return [elapsed]
    eta = progress.eta
    return [elapsed, f"ETA {'–:––:––' if eta is None else format_duration(eta)}"]


def _rate(progress: Progress) -> str:
    rate = progress.rate
    if rate is None:
        return ""
    if rate < 1:
        return f"{1 / rate:.3g} s/{progress.unit.removesuffix('s')}"
    return f"{rate:.3g} {progress.unit}/s" if rate < 1000 else f"{rate:.0f} {progress.unit}/s"


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
            shown = redact(value)
            self._print(self._out, Text.assemble("  ", (name.ljust(width), "dim"), "  ", shown))

    def line(self, text: str = "") -> None:
        """A line of text; above the live bar if there is one."""
        self._print(self._out, Text(redact(text)))

    def warn(self, text: str) -> None:
        """A warning on stderr; the same text is printed once only."""
        if text not in self._warned:
            self._warned.add(text)
            self._print(self._err, Text.assemble(("warning: ", "bold yellow"), redact(text)))

    def error(self, text: str) -> None:
        """An error on stderr, as one line without a traceback."""
        self._print(self._err, Text.assemble(("error: ", "bold red"), redact(text)))

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
            table.add_row(*(Text(redact(cell)) for cell in row))
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
