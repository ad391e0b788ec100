"""What a training run tells the outside, every N steps: metrics.jsonl, the monitors, warnings."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .display.terminal import Terminal
from .objectives import Loss
from .step_metrics import MetricRing, MetricsFile

WINDOWS_BEFORE_WARNING = 3

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
    ) -> None:
        self._ring = MetricRing(window, num_timesteps, device)
        self._file = MetricsFile(run_dir / "metrics.jsonl")
        self._global_batch = global_batch
        self._world_size = world_size
        self._terminal = terminal
        self._write_events = write_events
        self._window_started = time.monotonic()
        self._windows_unlearning = 0
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

    def add(self, loss: Loss, timesteps: Tensor) -> None:
        """Add one micro-batch to the step in progress."""
        self._ring.add(loss, timesteps)

    def discard_step(self) -> None:
        """Forget the step in progress: it was skipped."""
        self._ring.discard_row()

    def close_step(self, host: dict[str, Any], gradient_norm: float | Tensor | None) -> None:
        """End the step in progress, and the window with it if that is full."""
        self._ring.close_row(host, gradient_norm)
        if self._ring.is_full:
            self.flush()

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
        if self._write_events is not None:
            self._write_events(_events(rows))
        self._warn_if_both_errors_rise(rows)
        shown = {name: rows[-1][name] for name in ("loss", "accuracy")}
        self.latest = {name: value for name, value in shown.items() if value is not None}
        self.latest["pairs_s"] = pairs_per_second

    def _warn_if_both_errors_rise(self, rows: list[dict[str, Any]]) -> None:
        """DPO's known failure: the margin grows while both images become less likely."""
        if rows[-1]["winner_error"] is None:  # this objective knows no reference
            return
        winner = sum(row["winner_error"] for row in rows) / len(rows)
        loser = sum(row["loser_error"] for row in rows) / len(rows)
        # A rise of the winner's error that is small beside the loser's is noise of the timesteps.
        rising = winner > 0 and loser > 0 and winner > 0.5 * loser
        self._windows_unlearning = self._windows_unlearning + 1 if rising else 0
        if self._windows_unlearning >= WINDOWS_BEFORE_WARNING:
            self._terminal.warn(
                "winner and loser errors both rise above the reference's: the policy is "
                "unlearning, not preferring; raise objective.beta or lower train.optimizer.lr"
            )


def _events(rows: list[dict[str, Any]]) -> list[Event]:
    return [
        (f"train/{name}", value, row["step"])
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step"
    ]
