"""DeepSpeed's part of a checkpoint: its partitions, and its collectives never left half-way.

Beside every partition lies a table of what is where in it (:mod:`.zero_layout`).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import deepspeed

from ...basics.failpoints import failpoint
from ...ranks import Ranks
from .layout import Layout, layout_of, layout_path, load_layout
from .resharding import load_data, read_divided_anew

TAG = "deepspeed"
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError)


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


class _OnlyData:
    """A checkpoint engine that loads data and nothing else: DeepSpeed's own runs what is in a file,
    and a run folder may come from somebody else.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def load(self, path: str, map_location: Any = None) -> Any:
        return load_data(path, map_location=map_location)


def write_partitions(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int) -> None:
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
    layout = layout_of(engine)
    if layout is not None:
        layout.save(folder / TAG, rank)
    failpoint("checkpoint.written")


def read_partitions(
    engine: deepspeed.DeepSpeedEngine, ranks: Ranks, folder: Path, saved_ranks: int
) -> str | None:
    """Load what :func:`write_partitions` wrote on ``saved_ranks`` ranks, under any ZeRO stage.

    Where nothing but the step has changed DeepSpeed reads its own files, which is exact to the last
    bit of every later loss; otherwise the partitions are divided anew. Returns a line about that.

    Raises OSError, RuntimeError, ValueError or KeyError, on all ranks and before any state has
    changed, if the checkpoint cannot be read.
    """
    own = layout_of(engine)
    saved = ranks.on_first(lambda: _layout_of_first(folder / TAG))
    if own is None or saved is None:
        if own is not None or saved is not None:
            raise ValueError(
                "it was written under another optimiser of DeepSpeed's: keep data_types and the "
                "ZeRO stage in its JSON as they were"
            )
        if saved_ranks != ranks.world_size:
            raise ValueError(
                f"{saved_ranks} ranks wrote it without the table that others would need, now there "
                f"are {ranks.world_size}: resume with as many"
            )
    elif not _are_divided_alike(own, folder / TAG, ranks, saved_ranks):
        read = partial(read_divided_anew, engine, folder / TAG, own, saved_ranks)
        ranks.together(read, UNREADABLE).take(engine)
        return (
            f"{folder.name} was written by {saved_ranks} x ZeRO-{saved.stage}: divided anew for "
            f"{ranks.world_size} x ZeRO-{own.stage}"
        )
    ranks.together(partial(_look_into_own, folder / TAG, ranks.rank), UNREADABLE)
    _read_own(engine, folder)
    return None


def _layout_of_first(folder: Path) -> Layout | None:
    """The table that rank 0 wrote, None where it wrote none."""
    if not folder.is_dir():
        # DeepSpeed would say nothing and start afresh; a resume that found nothing is an error.
        raise ValueError("DeepSpeed has saved nothing in it")
    return load_layout(folder, 0) if layout_path(folder, 0).exists() else None


def _are_divided_alike(own: Layout, folder: Path, ranks: Ranks, saved_ranks: int) -> bool:
    if saved_ranks != ranks.world_size:
        return False
    saved = ranks.together(partial(load_layout, folder, ranks.rank), UNREADABLE)
    return all(ranks.gather(own.divides_like(saved)))


def _look_into_own(folder: Path, rank: int) -> None:
    """Raise what DeepSpeed would meet when it reads this rank's files: there, ranks wait for each
    other. The tensors are mapped, not read.
    """
    for path in folder.glob("*.pt"):
        if "pp_rank_" not in path.name or f"pp_rank_{rank}_" in path.name:
            load_data(path, map_location="cpu", mmap=True)


def _read_own(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    reader = _OnlyData(engine.checkpoint_engine)
    engine.checkpoint_engine = reader
    try:
        path, _ = engine.load_checkpoint(
            str(folder), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
    finally:
        engine.checkpoint_engine = reader._inner
    if path is None:
        raise ValueError("DeepSpeed found nothing to load in it")
