"""What a training run tells the outside, every N steps: metrics.jsonl, the monitors, warnings.

Metrics of every optimiser step are kept on the device and moved to the host once in N steps. A
step's row holds sums over pairs, so rows add up over micro-batches and ranks; the division comes
last. One all-reduce and one copy serve all rows since the previous flush.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..basics.errors import DataError, OutsideError, told_by
from ..basics.files import naming, replacing
from ..display.terminal import Terminal
from ..objectives import Loss

QUARTILES = 4
_SUMS = ("pairs", "winner_error", "loser_error", "margin", "accuracy")
_KEPT = "loser_kept"  # of safeguarded losers


class MetricRing:
    """Rows of sums on the device: for all timesteps, and for each quartile of the timesteps."""

    def __init__(
        self, capacity: int, num_timesteps: int, device: torch.device, guarded: bool = False
    ) -> None:
        """``guarded`` says that losses tell of the loser's gradient how much is kept."""
        self._num_timesteps = num_timesteps
        self._names = (*_SUMS, _KEPT) if guarded else _SUMS
        # Column 0 of the last axis is the whole range, 1..4 the quartiles of t.
        shape = (capacity, len(self._names), 1 + QUARTILES)
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        self._losses = torch.zeros(capacity, dtype=torch.float64, device=device)
        self._quartiles = torch.arange(QUARTILES, device=device)
        self._host: list[dict[str, Any]] = []
        self._same: list[Mapping[str, Tensor]] = []

    @property
    def is_full(self) -> bool:
        return len(self._host) == len(self._losses)

    def add(self, loss: Loss, timesteps: Tensor) -> None:
        """Add one micro-batch to the row of the step in progress."""
        row = len(self._host)
        logits = loss.logits.double()
        columns = [
            torch.ones_like(logits),
            loss.winner_error.double(),
            loss.loser_error.double(),
            logits,
            # A tie, as at step 0, is neither right nor wrong; NaN has sign 0, and stays NaN.
            logits.sign().where(~logits.isnan(), logits) / 2 + 0.5,
        ]
        if _KEPT in self._names:
            assert loss.loser_kept is not None
            columns.append(loss.loser_kept.double())
        values = torch.stack(columns)
        # Pure noise, where a flow model may begin, is of the last.
        quartile = (timesteps * QUARTILES // self._num_timesteps).clamp(max=QUARTILES - 1)
        members = (quartile[:, None] == self._quartiles).double()
        everyone = torch.ones_like(members[:, :1])
        self._sums[row] += values @ torch.cat([everyone, members], dim=1)
        self._losses[row] += loss.loss.detach().double() * len(logits)

    def close_row(
        self,
        host: dict[str, Any],
        gradient_norm: float | Tensor | None,
        same: Mapping[str, Tensor] | None = None,
    ) -> None:
        """End the step in progress; ``host`` is what is known without asking the device, and so is
        the norm: the decision to take the step was made by it. ``same`` are numbers () on the
        device that all ranks share; `cached` in ``host``, the pairs of this rank whose frozen
        passes were kept, is summed over the ranks.
        """
        norm = float("nan") if gradient_norm is None else float(gradient_norm)
        self._host.append({**host, "grad_norm": None if norm != norm else norm})
        self._same.append(same or {})

    def discard_row(self) -> None:
        """Forget the step in progress (it was skipped)."""
        row = len(self._host)
        self._sums[row].zero_()
        self._losses[row] = 0

    def flush(self, world_size: int) -> list[dict[str, Any]]:
        """All closed rows as dictionaries, over all ranks; the ring is empty afterwards."""
        count = len(self._host)
        if count == 0:
            return []
        known = "cached" in self._host[0]
        cached = torch.tensor([host.pop("cached", 0) for host in self._host], dtype=torch.float64)
        columns = [self._sums[:count].flatten(1), self._losses[:count, None]]
        if known:
            columns.insert(0, cached.to(self._losses.device)[:, None])
        flat = torch.cat(columns, dim=1)
        if world_size > 1:
            dist.all_reduce(flat)
        names = list(self._same[0])
        same = [torch.stack([row[name] for row in self._same]) for name in names]
        flat = torch.cat([flat, *(column[:, None].to(flat) for column in same)], dim=1).cpu()
        rows = []
        for host, values in zip(self._host, flat, strict=True):
            sizes = [int(known), len(values) - known - len(names), len(names)]
            served, sums, shared = values.split(sizes)
            row = {**host, **_describe(sums, self._names)}
            row |= dict(zip(names, shared.tolist(), strict=True))
            if known:
                row["cached"] = float(served / sums[0])
            rows.append(row)
        self._sums.zero_()
        self._losses.zero_()
        self._host.clear()
        self._same.clear()
        return rows


def _describe(values: Tensor, names: Sequence[str]) -> dict[str, float | None]:
    sums = values[:-1].view(len(names), 1 + QUARTILES)
    pairs = sums[0]
    described: dict[str, float | None] = {"loss": float(values[-1] / pairs[0])}
    for name, total in zip(names[1:], sums[1:], strict=True):
        # NaN where no pair is in the quartile, and where the objective does not compute it.
        overall, *by_quartile = (None if x != x else x for x in (total / pairs).tolist())
        described[name] = overall
        described |= {f"{name}_q{q}": mean for q, mean in enumerate(by_quartile, 1)}
    return described


class MetricsFile:
    """`metrics.jsonl`: one JSON object an optimiser step, in order, without gaps or repetitions.

    A last line that is torn is what a killed run leaves, and counts as not written. Any other that
    is no row is a DataError with its number: what follows it must not vanish with it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int, wanted: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Drop what a killed run wrote after the checkpoint of ``step``, a torn last line too, and
        what is not ``wanted``.
        """
        if not self.path.exists():
            return
        kept: list[dict[str, Any]] = []
        for row in self._rows():
            if row["step"] <= step and (wanted is None or wanted(row)):
                kept.append(row)
            if row["step"] >= step:
                break  # whatever is wrong with the rest, it goes
        with replacing(self.path, error=None) as file:
            file.writelines((json.dumps(line) + "\n").encode() for line in kept)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Write rows to the end, down to the disk."""
        with naming(self.path), open(self.path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Every complete row."""
        return list(self._rows()) if self.path.exists() else []

    def _rows(self) -> Iterator[dict[str, Any]]:
        lines = self.path.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or type(row.get("step")) is not int:
                    raise ValueError("it is no row of metrics")
            except ValueError as error:  # of JSON, of UTF-8
                if number == len(lines):
                    return
                raise DataError(
                    f"{self.path} line {number} of {len(lines)}: {told_by(error)}: the file is "
                    "damaged; restore it, or remove that line and do without that step",
                    str(self.path),
                    "damaged",
                ) from None
            yield row


WINDOWS_BEFORE_WARNING = 3


def both_errors_rise(rows: Sequence[Mapping[str, Any]], window: int) -> bool:
    """DPO's known failure at the end of ``rows``: the margin grows while both images become less
    likely. The trainer warns of it while it happens, and reports find it in the same way.

    In each of the last three windows of ``window`` steps the errors of winners and of losers are
    above the reference's. A winner's that is under half the loser's is noise of the timesteps.
    False for objectives that know no reference, and of rows too few to tell.
    """
    recent = rows[-WINDOWS_BEFORE_WARNING * window :]
    if len(recent) < WINDOWS_BEFORE_WARNING * window:
        return False
    # None, of what an objective does not compute, becomes NaN, which is above nothing.
    errors = [[row.get(name) for row in recent] for name in ("winner_error", "loser_error")]
    shape = (2, WINDOWS_BEFORE_WARNING, window)
    winner, loser = np.asarray(errors, np.float64).reshape(shape).mean(axis=2)
    return bool(((winner > 0) & (loser > 0) & (winner > 0.5 * loser)).all())


Event = tuple[str, float, int]


class RunLog:
    """Collects steps on the device and passes them on in windows; all ranks flush together."""

    def __init__(
        self,
        run_dir: Path,
        *,
        window: int,
        global_batch: int,
        num_timesteps: int,
        world_size: int,
        device: torch.device,
        terminal: Terminal,
        write_events: Callable[[list[Event]], None] | None,
        guarded: bool = False,
    ) -> None:
        self._window = window
        self._ring = MetricRing(window, num_timesteps, device, guarded)
        self._file = MetricsFile(run_dir / "metrics.jsonl")
        self._global_batch = global_batch
        self._world_size = world_size
        self._terminal = terminal
        self._write_events = write_events
        self._window_started = time.monotonic()
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOWS_BEFORE_WARNING * window)
        self.latest: dict[str, float] = {}
        """What the progress bar shows of the last window."""

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Time spent inside is not training: it does not lower pairs/s."""
        stopped = time.monotonic()
        yield
        self._window_started += time.monotonic() - stopped

    def start_after(self, step: int) -> None:
        """Go on after ``step``: what a killed run logged beyond it is forgotten."""
        self._window_started = time.monotonic()
        if self._terminal.enabled:
            self._file.rewind(step)
            self._recent.extend(self._file.read())

    def add(self, loss: Loss, timesteps: Tensor) -> None:
        """Add one micro-batch to the step in progress."""
        self._ring.add(loss, timesteps)

    def discard_step(self) -> None:
        """Forget the step in progress: it was skipped."""
        self._ring.discard_row()

    def close_step(
        self,
        host: dict[str, Any],
        gradient_norm: float | Tensor | None,
        same: Mapping[str, Tensor] | None = None,
    ) -> None:
        """End the step in progress, and the window with it if that is full."""
        self._ring.close_row(host, gradient_norm, same)
        if self._ring.is_full:
            self.flush()

    def tell_evaluation(self, row: Mapping[str, Any]) -> None:
        """Pass on what an evaluation found to the monitors."""
        if self._terminal.enabled:
            names = ("gain", "low", "high", "divergence", "seconds")
            found = [(f"evaluate/{name}", row[name], row["step"]) for name in names]
            self._track([event for event in found if event[1] is not None])

    def flush(self) -> None:
        """Pass on all closed steps: one all-reduce, one transfer from the device."""
        rows = self._ring.flush(self._world_size)
        seconds = time.monotonic() - self._window_started
        self._window_started = time.monotonic()
        if not rows or not self._terminal.enabled:
            return
        pairs_per_second = len(rows) * self._global_batch / seconds
        for row in rows:
            row["pairs_per_second"] = pairs_per_second
        self._file.append(rows)
        self._track(_events(rows))
        self._recent.extend(rows)
        if both_errors_rise(list(self._recent), self._window):
            self._terminal.warn(
                "winner and loser errors both rise above the reference's: the policy is "
                "unlearning, not preferring; raise objective.beta or lower train.optimizer.lr"
            )
        shown = {name: rows[-1][name] for name in ("loss", "accuracy")}
        self.latest = {name: value for name, value in shown.items() if value is not None}
        self.latest["pairs_s"] = pairs_per_second

    def _track(self, events: list[Event]) -> None:
        """Hand events to the trackers. OutsideError for whatever they raise: they are not ours, and
        a full disk comes out of some as an error of their own, of a thread, or of a closed queue.
        """
        if self._write_events is None:
            return
        try:
            self._write_events(events)
        except Exception as error:
            raise OutsideError(
                f"a tracker of `monitor` cannot take step {events[-1][2]}: {told_by(error)}; "
                "its steps are in metrics.jsonl",
                "monitor",
                "unwritable",
            ) from error


def _events(rows: list[dict[str, Any]]) -> list[Event]:
    return [
        (f"train/{name}", value, row["step"])
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step"
    ]
