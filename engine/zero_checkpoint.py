"""DeepSpeed's part of a checkpoint: its partitions, and its collectives never left half-way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed

from .failpoints import failpoint

TAG = "deepspeed"


class _Guard:
    """A checkpoint engine that remembers what could not be written instead of raising it.

    DeepSpeed meets in barriers while it saves: a rank that left with an error, its disk being full,
    would leave the others waiting there.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.error: OSError | RuntimeError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self._inner.save(state_dict, path)
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its zip writer.
            self.error = error


def write_partitions(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Write every rank's partition under ``folder``; the error of this rank's disk comes last."""
    guard = _Guard(engine.checkpoint_engine)
    try:
        failpoint("checkpoint.write")
    except OSError as error:
        guard.error = error
    engine.checkpoint_engine = guard
    # A checkpoint holds data, no scripts; and copying them is a write outside the guard.
    engine._copy_recovery_script = lambda save_path: None
    try:
        engine.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=True
        )
    finally:
        engine.checkpoint_engine = guard._inner
    if guard.error is not None:
        raise guard.error


def read_partitions(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Load what :func:`write_partitions` wrote; ValueError if DeepSpeed finds nothing."""
    path, _ = engine.load_checkpoint(
        str(folder), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
    )
    if path is None:
        # DeepSpeed says nothing and starts afresh; a resume that found nothing is an error.
        raise ValueError("DeepSpeed found nothing to load in it")
