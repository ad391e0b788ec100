"""Committed checkpoints: a folder counts only once its manifest is in place and verifies.

Protocol (all ranks together): files go to ``step-N.tmp/``; every rank fsyncs its own files and
hashes them; the ranks agree; rank 0 writes ``MANIFEST.json``, fsyncs it and the folder, and renames
to ``step-N``; the ranks read it back, each a share; and only then rank 0 replaces ``latest`` and
drops older checkpoints. A crash at any point leaves the previous checkpoint whole. ``latest`` is a
hint for people: a resume takes the newest folder that all ranks find whole. There, too, each hashes
a share, the partition that it wrote or will read among it, from the machine on which it reads.
What holds NaN or infinity is not committed, and not taken.

Saving is synchronous: measured, it takes as long as 0.7 steps, 1.4 % of a run with a checkpoint
every 50 steps (``benchmarks/LOG.md``), and a thread that writes meanwhile could win no more than
that. It would cost the state a second time in host memory, and commits that lag behind the steps.
States of tens of gigabytes, where it may pay, have not been measured.

DeepSpeed writes and reads its own ZeRO partitions inside; they are pickles, so a checkpoint is as
trusted as the code that made it: never resume from a stranger's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ...basics.errors import (
    CdpoError,
    CheckpointError,
    NumericsError,
    OutsideError,
    RecipeError,
    told_by,
)
from ...basics.failpoints import failpoint
from ...basics.files import replacing, sync_path
from ...basics.versions import code_version
from ...curriculum.pacing import Cursor
from ...models.fingerprints import changed_parts, named
from ...ranks import Ranks
from ...recipe import Recipe
from ...recipe.identity import (
    CHANGEABLE,
    Change,
    diff_identity,
    differences,
    recipe_hash,
    save_resolved,
    training_identity,
)
from ..finite import NotFiniteError, advice, check_finite
from .files import FORMAT, check_file, read_manifest, sync_and_describe, write_manifest

_COMMITTED = re.compile(r"step-(\d+)")
_PARTITION = re.compile(r"pp_rank_(\d+)_")


class CheckpointStore:
    """The checkpoints of one run folder, written and read by all ranks together."""

    def __init__(self, folder: Path, ranks: Ranks, recipe: Recipe, keep: int) -> None:
        self.folder = folder
        self.ranks = ranks
        self.recipe = recipe
        self.keep = keep
        self.data_hash: str | None = None
        """Of the shards that are trained on; None while nobody has looked at them."""
        self.parts: Mapping[str, str] | None = None
        """Fingerprints of what is trained and what teaches it, once they are known: a resume is
        held to them instead of the names of files, which a checkpoint without any is held to."""
        self.speed = ""
        """The knobs of `speed` as they were decided for the device, which a checkpoint tells."""
        self.best: int | None = None
        """A step whose checkpoint is kept however old it is."""
        self.passed_over: list[str] = []
        """The newer checkpoints that `load_newest` found damaged, and how."""
        self.allowed: Collection[str] = ()
        """Keys in which the recipe may differ from that of the checkpoint."""
        self.changes: list[Change] = []
        """Where it does, and did when the checkpoint before was gone on from."""
        self.changed: list[Change] = []
        """Those of them that this start has made."""

    def folder_of(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is, or would be."""
        return self.folder / f"step-{step:08d}"

    def newest_step(self) -> int:
        """Of the newest checkpoint, whole or not; 0 if there is none."""
        return max((step for step, _ in self.ranks.on_first(self._committed)), default=0)

    def last_batches(self) -> tuple[int, int] | None:
        """Ranks, and pairs in one forward of each, of the newest checkpoint that tells; None if
        there is none.
        """
        found = self.ranks.on_first(lambda: [_told_batches(path) for _, path in self._committed()])
        return next((each for each in found if each is not None), None)

    def save(
        self, cursor: Cursor, write: Callable[[Path], None], *, after_skips: bool = False
    ) -> Path:
        """Commit ``cursor``; ``write(folder)`` is called on every rank to put its files there.

        ``after_skips`` says that batches have been skipped since the last step: such a checkpoint
        never replaces the newest one for which it does not hold. A checkpoint that is there already
        is not written again; what its own save may have left undone is done.

        Raises CheckpointError on every rank if any rank fails, NumericsError if what any rank wrote
        is not finite; the previous checkpoint survives.
        """
        final = self.folder_of(cursor.step)
        temporary = final.with_suffix(".tmp")
        if not self._holds(final, cursor):
            self._write(temporary, final, cursor, write, after_skips)
        self.ranks.on_first(lambda: self._replace_older(final, cursor.step))
        return final

    def _write(
        self,
        temporary: Path,
        final: Path,
        cursor: Cursor,
        write: Callable[[Path], None],
        after_skips: bool,
    ) -> None:
        try:
            self.ranks.on_first(lambda: _fresh_folder(temporary))
            self.ranks.barrier()
            files = self._write_own(temporary, cursor.step, write)
            self.ranks.on_first(lambda: self._commit(temporary, final, cursor, files, after_skips))
            self._read_back(final)
        except CdpoError:
            if self.ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write_own(
        self, temporary: Path, step: int, write: Callable[[Path], None]
    ) -> dict[str, dict[str, Any]]:
        """Every rank writes, fsyncs, hashes and looks for numbers that are none; returns the union
        of what the ranks wrote.
        """
        error: Exception | None = None
        own: dict[str, dict[str, Any]] = {}
        try:
            write(temporary)
            if self.ranks.is_first:
                save_resolved(self.recipe, temporary / "recipe.yaml", self.changes)
        except (OSError, RuntimeError, RecipeError, OutsideError) as exc:
            # A full disk: torch.save has a RuntimeError of its zip writer, the recipe OutsideError.
            error = self._cannot_write(temporary, exc)
        self.ranks.agree(error)
        self.ranks.barrier()
        try:
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                if self._owner(path.name) == self.ranks.rank:
                    own[str(path.relative_to(temporary))] = sync_and_describe(path)
                    check_finite(path)
            failpoint("checkpoint.hashed")
        except NotFiniteError as exc:
            error = NumericsError(
                f"after step {step} the {told_by(exc)}: this is not saved, and "
                f"{self._survivor(temporary)}; {advice(self.recipe)}",
                f"step {step}",
                "non-finite",
            )
        except OSError as exc:
            error = self._cannot_write(temporary, exc)
        self.ranks.agree(error)
        return {name: entry for part in self.ranks.gather(own) for name, entry in part.items()}

    def _owner(self, name: str) -> int:
        """The rank that sees to a file: DeepSpeed's carry one in their name, the rest is rank 0's.

        Of a checkpoint of more ranks than there are, each sees to several partitions.
        """
        match = _PARTITION.search(name)
        return int(match.group(1)) % self.ranks.world_size if match else 0

    def _commit(
        self,
        temporary: Path,
        final: Path,
        cursor: Cursor,
        files: dict[str, dict[str, Any]],
        after_skips: bool,
    ) -> None:
        try:
            manifest = {
                "format": FORMAT,
                "code": code_version(),
                "step": cursor.step,
                "skips": list(cursor.skips),
                # The weights of one step are the same before and after batches that are skipped.
                "after_skips": after_skips and not _is_after_a_step(final),
                "world_size": self.ranks.world_size,
                "speed": self.speed,
                "zero": self.recipe.deepspeed,
                "recipe": recipe_hash(self.recipe),
                "identity": training_identity(self.recipe),
                "changes": [asdict(change) for change in self.changes],
                "data": self.data_hash,
                **({} if self.parts is None else {"parts": dict(self.parts)}),
                "files": files,
            }
            write_manifest(temporary, manifest)
            failpoint("checkpoint.manifest")
            for folder in sorted({path.parent for path in temporary.rglob("*")}):
                sync_path(folder)
            failpoint("checkpoint.before_rename")
            shutil.rmtree(final.with_suffix(".old"), ignore_errors=True)
            if final.exists():  # damaged, or of the same step before further batches were skipped
                final.rename(final.with_suffix(".old"))
                failpoint("checkpoint.replacing")
            temporary.rename(final)
            for folder in (self.folder, self.folder.parent):
                sync_path(folder)
            failpoint("checkpoint.after_rename")
        except OSError as exc:
            raise self._cannot_write(temporary, exc) from None

    def _read_back(self, final: Path) -> None:
        try:
            self._verify(final, finite=False)  # has been looked for
        except (OSError, ValueError) as exc:
            raise self._cannot_write(final, exc) from None

    def _replace_older(self, final: Path, step: int) -> None:
        """Point ``latest`` at the checkpoint of ``step`` and drop what it replaces."""
        try:
            with replacing(self.folder / "latest", error=None) as file:
                file.write(f"{final.name}\n".encode())
                failpoint("checkpoint.latest")
        except OSError as exc:
            raise self._cannot_write(self.folder / "latest", exc) from None
        failpoint("checkpoint.before_prune")
        newer = [old for number, old in self._committed() if number > step]
        older = [old for number, old in self._committed() if number <= step]
        finite = next((old for old in older if _is_after_a_step(old)), None)
        kept = {finite, None if self.best is None else self.folder_of(self.best)}
        older = [old for old in older[self.keep :] if old not in kept]
        # Newer ones did not verify, or we would stand there.
        for old in [*newer, *older, *self.folder.glob("step-*.tmp"), *self.folder.glob("*.old")]:
            # The new one is committed: what cannot be removed now may go with the next.
            shutil.rmtree(old, ignore_errors=True)
            failpoint("checkpoint.pruned")

    def _verify(self, folder: Path, *, finite: bool = True) -> dict[str, Any]:
        """The manifest of a folder that all ranks together find whole, and ``finite``.

        Raises OSError, or ValueError naming a file that differs or a tensor that is not finite, on
        all ranks alike.
        """
        manifest: dict[str, Any] = self.ranks.on_first(lambda: _manifest_of_step(folder))
        error: Exception | None = None
        try:
            for name, entry in manifest["files"].items():
                if self._owner(name) == self.ranks.rank:
                    check_file(folder, name, entry)
                    if finite:
                        check_finite(folder / name)
        except (OSError, ValueError) as exc:
            error = exc
        self.ranks.agree(error)
        return manifest

    def _holds(self, folder: Path, cursor: Cursor) -> bool:
        """Whether ``folder`` already holds this very state."""
        if not self.ranks.on_first(folder.is_dir):
            return False
        try:
            return tuple(self._verify(folder)["skips"]) == cursor.skips
        except (OSError, ValueError):
            return False

    def load_newest(self, read: Callable[[Path, int], object]) -> Cursor | None:
        """Resume from the newest checkpoint that verifies; None if there is none at all.

        ``read(folder, ranks)`` is called on every rank, with the number of those that wrote.
        Raises CheckpointError if the checkpoint belongs to another recipe or data set, or if
        checkpoints exist but none verifies, or existed and are gone.
        """
        folder, manifest = self._newest()
        if folder is None:
            return None
        # The files of a model may be others on one machine alone.
        self.ranks.together(lambda: self._refuse_strangers(folder, manifest))
        return self._read(folder, manifest, read)

    def load(self, step: int, read: Callable[[Path, int], object]) -> None:
        """Read the checkpoint of ``step`` as :meth:`load_newest` does. CheckpointError if it is
        gone, or not whole.
        """
        folder = self.folder_of(step)
        try:
            manifest = self._verify(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {folder}, the best of the run, is not whole: {told_by(error)}; "
                "export.of=last exports the last",
                str(folder),
                "damaged",
            ) from None
        self._read(folder, manifest, read)

    def _read(
        self, folder: Path, manifest: dict[str, Any], read: Callable[[Path, int], object]
    ) -> Cursor:
        error: Exception | None = None
        try:
            read(folder, manifest["world_size"])
        except (OSError, RuntimeError, ValueError, KeyError) as exc:
            error = CheckpointError(
                f"checkpoint {folder} cannot be read: {told_by(exc)}", str(folder), "unreadable"
            )
        self.ranks.agree(error)
        return Cursor(manifest["step"], tuple(manifest["skips"]))

    def _newest(self) -> tuple[Path | None, dict[str, Any]]:
        problems: list[str] = []
        for folder in self.ranks.on_first(self._found):
            try:
                manifest = self._verify(folder)
                self.passed_over = problems
                return folder, manifest
            except (OSError, ValueError) as error:
                problems.append(f"{folder.name}: {told_by(error)}")
        if problems:
            raise CheckpointError(
                f"none of the checkpoints in {self.folder} is whole ({'; '.join(problems)}): "
                "remove the folder to start afresh",
                str(self.folder),
                "damaged",
            )
        return None, {}

    def _refuse_strangers(self, folder: Path, manifest: dict[str, Any]) -> None:
        parts = manifest.get("parts") if self.parts is not None else None
        self._refuse_other_recipe(folder, manifest, by_name=parts is None)
        if parts is not None and (others := changed_parts(parts, self.parts or {})):
            raise CheckpointError(
                f"checkpoint {folder} was trained with another {named(others)}: bring back the "
                "files that the recipe names, or give another run_dir",
                others[0],
                "changed",
            )
        if self.data_hash is not None and manifest["data"] != self.data_hash:
            raise CheckpointError(
                f"checkpoint {folder} was trained on other shards (manifest "
                f"{manifest['data'][:12]}, now {self.data_hash[:12]}): give another run_dir",
                "shards",
                "changed",
            )

    def _refuse_other_recipe(self, folder: Path, manifest: dict[str, Any], by_name: bool) -> None:
        """CheckpointError where the recipe differs and was not allowed to; the rest is noted."""
        identity = training_identity(self.recipe)
        found = differences(manifest["identity"], identity, by_name=by_name)
        refused = [key for key in found if key not in self.allowed]
        if refused:
            lines = diff_identity(manifest["identity"], identity, by_name=by_name)
            remedy = "Restore these values, or give another run_dir"
            if all(map(CHANGEABLE.fullmatch, refused)):
                options = " ".join(f"--allow-change {key}" for key in found)
                remedy += f"; or go on with the new ones from here: add {options}"
            raise CheckpointError(
                f"checkpoint {folder} was made by another recipe: {'; '.join(lines)}. {remedy}",
                refused[0],
                "changed",
            )
        step = manifest["step"]
        self.changed = [Change(step, key, *values) for key, values in found.items()]
        self.changes = [Change(**made) for made in manifest.get("changes", [])] + self.changed

    def _found(self) -> list[Path]:
        """Committed folders, newest first, after a look for a replacement that a crash has cut in
        two, the old one away and the new one not yet: the old one is put back.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("step-*.old"):
            if not old.with_suffix("").exists():
                old.rename(old.with_suffix(""))
        found = [folder for _, folder in self._committed()]
        if not found and (self.folder / "latest").exists():
            raise CheckpointError(
                f"the checkpoints in {self.folder} are gone, of which there were some: bring them "
                "back, or remove the folder to start afresh",
                str(self.folder),
                "missing",
            )
        return found

    def _committed(self) -> list[tuple[int, Path]]:
        """Steps and folders of committed checkpoints, newest first."""
        if not self.folder.is_dir():
            return []
        found = [
            (int(match.group(1)), path)
            for path in self.folder.iterdir()
            if path.is_dir() and (match := _COMMITTED.fullmatch(path.name))
        ]
        return sorted(found, reverse=True)

    def _cannot_write(self, folder: Path, error: Exception) -> CheckpointError:
        reason = told_by(error)
        if not isinstance(error, OSError):  # torch does not say so when the disk is full
            reason += f" ({shutil.disk_usage(self.folder).free >> 20} MiB free on the disk)"
        return CheckpointError(
            f"checkpoint {folder.stem} cannot be written: {reason}; {self._survivor(folder)}",
            str(folder),
            "unwritable",
        )

    def _survivor(self, folder: Path) -> str:
        """What there is beside a checkpoint that could not be made."""
        kept = [path.name for _, path in self._committed() if path.name != folder.stem]
        return f"{kept[0]} is untouched" if kept else "there was none before"


def _fresh_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint folder {folder} cannot be made: {told_by(error)}",
            str(folder),
            "unwritable",
        ) from None


def _is_after_a_step(folder: Path) -> bool:
    """Whether a checkpoint was taken after a step that was finite, not after skipped batches."""
    try:
        return not read_manifest(folder).get("after_skips", False)
    except (OSError, ValueError):
        return False


def _told_batches(folder: Path) -> tuple[int, int] | None:
    try:
        ranks = read_manifest(folder)["world_size"]
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
        pairs = recipe["train"]["micro_batch"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return (ranks, pairs) if type(ranks) is int and type(pairs) is int else None


def _manifest_of_step(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, if that bears the name of its step."""
    manifest = read_manifest(folder)
    if folder.name != f"step-{manifest['step']:08d}":
        raise ValueError(f"it is the checkpoint of step {manifest['step']}, under another name")
    return manifest
